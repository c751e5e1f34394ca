"""Groups of responses to one prompt whose rewards are all equal: they give no gradient, and too many stop a run."""

from collections import Counter, defaultdict

from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_aqn.config.schema import NoiseConfig, parse_aqn
from verl_aqn.errors import ProcessFault, TrainingError
from verl_aqn.integrations.verl.failures import failure_reason, moment
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.request_seeds import order_of_key, place_of


class AqnReplayBuffer(ReplayBuffer):
    """verl's sampler, extended: it records which groups it discarded and took, and takes them in the order of the data.

    If groups are filtered, verl builds its own class (it does not pass the filter to a custom sampler). Therefore the
    class of verl's object is changed to this class after the object was built.
    """

    thrown_away: Counter  # groups of this step without variance: {the value of their metric: number}
    failed: int  # groups of this step without a response; a recipe may have them replaced
    taken: KVBatchMeta
    folder: RunFolder
    step: int
    selected: list[str]  # uids of the groups that were taken, in the order of the data

    def begin(self) -> None:
        """Reset the counts for a new step."""
        self.thrown_away, self.failed = Counter(), 0

    def on_failure(self, partition_id: str) -> None:
        """Handle failed responses to a prompt. The trainer replaces this method by its own, which may stop the run."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        self.step = global_steps
        if partition_id == "val":
            found, metrics = super().sample(global_steps, partition_id, batch_size)
            if not found.keys:  # verl would continue, and fail on the empty batch
                raise self.no_answers(partition_id, batch_size)
            return found, metrics
        self.begin()
        self.taken, metrics = super().sample(global_steps, partition_id, batch_size)
        return self.taken, metrics

    def _sync_metadata_from_transfer_queue(self):
        """Read the queue's metadata as verl does, and report failures at once: other responses may take minutes."""
        super()._sync_metadata_from_transfer_queue()
        for partition_id, uids in self.failure_keys.items():
            if uids:
                self.on_failure(partition_id)

    def no_answers(self, partition_id: str, count: int) -> ProcessFault:
        """Return the error for `count` problems without any response.

        A new attempt may succeed: a process that died is a possible reason.
        """
        what = moment(partition_id, self.step)
        reason = failure_reason(self.folder, partition_id, self.step, count) or "see training.log for the reason"
        return ProcessFault(f"{what}: all responses to {count} problems failed: {reason}")

    def _select_prompt_uids(self, partition_id, sampleable_keys, batch_size):
        """Select the first groups in the order of the data, so that the selection is the same in every run.

        verl selects in the order of a set of strings, which changes from run to run.
        """
        if partition_id == "val":
            return super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        uids, *snapshots = super()._select_prompt_uids(partition_id, sampleable_keys, len(sampleable_keys))
        self.selected = sorted(uids, key=place_of)[:batch_size]
        answered = {key.split("_")[0] for key in snapshots[0]}
        if not answered.intersection(self.selected):  # verl's own error would suggest drawing other problems
            raise self.no_answers(partition_id, batch_size)
        return self.selected, *snapshots

    def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot):
        """Build the batch as verl does, but in the order of the keys instead of the order of arrival."""
        batch = super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)
        if partition_id != "val":
            batch.reorder(sorted(range(len(batch)), key=lambda n: order_of_key(batch.keys[n])))
        return batch

    def _evict_terminal_groups(self, global_steps, partition_id, eviction_reasons):
        self.thrown_away.update(eviction_reasons[3])
        self.failed += len(eviction_reasons[2])
        return super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)


def check_refill(thrown_away: Counter, failed: int, config: DictConfig, step: int, sigma: float) -> None:
    """Raise TrainingError before a refill if this step has already discarded as many groups as the recipe allows.

    `failed` groups, which have no response, are counted separately.

    verl's V1 trainer ignores verl's own limit (`algorithm.filter_groups.max_num_gen_batches`) and would draw prompts
    for ever. This function applies the limit, in batches of `data.train_batch_size` groups.
    """
    rule = config.algorithm.filter_groups
    limit, name = rule.max_num_gen_batches * config.data.train_batch_size, "algorithm.filter_groups.max_num_gen_batches"
    if limit and failed >= limit:
        raise TrainingError(
            f"step {step}: generation or reward of {failed} groups failed (limit {name}={rule.max_num_gen_batches}): "
            "the errors are in training.log"
        )
    count = thrown_away.total()
    if count < limit or not count:
        return
    mean = sum(value * times for value, times in thrown_away.items()) / count
    raise TrainingError(
        f"step {step}: {count} groups had no variance in {rule.metric} and were discarded (σ {sigma:g}, mean "
        f"{rule.metric} {mean:.3f}, limit {name}={rule.max_num_gen_batches}): "
        f"{remedy(sigma, mean, parse_aqn(config).noise)}"
    )


def remedy(sigma: float, mean: float, noise: NoiseConfig) -> str:
    """Return advice for rewards that do not differ, in a step with `sigma` and mean reward `mean`."""
    if mean > 0.5:
        return "use harder prompts"
    prompts = "use easier prompts (worked examples help)"
    if sigma == 0:
        return prompts
    if noise.target_kl is not None:
        return f"lower aqn.noise.target_kl ({noise.target_kl:g} nats per token), or {prompts}"
    if rule := noise.controller:
        return f"lower aqn.noise.control.value or sigma_max ({rule.sigma_max:g} {noise.unit}), or {prompts}"
    return (
        f"lower aqn.noise.sigma_start ({noise.sigma_start:g} {noise.unit}; `verl-aqn probe` shows what each σ does), "
        f"set aqn.noise.target_kl=0.1 to choose σ automatically, or {prompts}"
    )


def count_groups(uids: list[str], rewards: list[float]) -> tuple[int, int]:
    """Return the number of groups, and of groups whose rewards are all equal; a single sample is not a group."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for uid, reward in zip(uids, rewards, strict=True):
        by_group[uid].append(reward)
    groups = [found for found in by_group.values() if len(found) > 1]
    return len(groups), sum(min(found) == max(found) for found in groups)
