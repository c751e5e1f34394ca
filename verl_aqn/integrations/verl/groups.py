"""Groups of answers to one prompt whose rewards are all equal: they teach nothing, and too many of them end a run."""

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
    """verl's sampler, which also tells what it threw away and what it took, and takes it in the order of the data.

    verl builds its own class where groups are filtered (a custom sampler would not be given the filter), so its object
    is turned into this one after it was made.
    """

    thrown_away: Counter  # groups without variance of this step: {their metric's one value: how many}
    failed: int  # groups of this step without an answer, which a recipe may have replaced
    taken: KVBatchMeta
    folder: RunFolder
    step: int
    selected: list[str]  # uids of the groups that were taken, in the order of the data

    def begin(self) -> None:
        """A new step."""
        self.thrown_away, self.failed = Counter(), 0

    def on_failure(self, partition_id: str) -> None:
        """Called where answers to a prompt failed. The trainer puts in its own, which may stop the run."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        self.step = global_steps
        if partition_id == "val":
            found, metrics = super().sample(global_steps, partition_id, batch_size)
            if not found.keys:  # verl would go on, and stumble over nothing
                raise self.no_answers(partition_id, batch_size)
            return found, metrics
        self.begin()
        self.taken, metrics = super().sample(global_steps, partition_id, batch_size)
        return self.taken, metrics

    def _sync_metadata_from_transfer_queue(self):
        """As verl's, at each look at the queue. Failures are told at once: the other answers may take minutes."""
        super()._sync_metadata_from_transfer_queue()
        for partition_id, uids in self.failure_keys.items():
            if uids:
                self.on_failure(partition_id)

    def no_answers(self, partition_id: str, count: int) -> ProcessFault:
        """Why there is no answer to `count` problems. Worth another start: a process that died leaves none either."""
        what = moment(partition_id, self.step)
        reason = failure_reason(self.folder, partition_id, self.step, count) or "training.log says why"
        return ProcessFault(f"{what}: every answer to {count} problems failed: {reason}")

    def _select_prompt_uids(self, partition_id, sampleable_keys, batch_size):
        """verl takes any of them, as a set of strings yields them; the first ones of the data are always the same."""
        if partition_id == "val":
            return super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        uids, *snapshots = super()._select_prompt_uids(partition_id, sampleable_keys, len(sampleable_keys))
        self.selected = sorted(uids, key=place_of)[:batch_size]
        answered = {key.split("_")[0] for key in snapshots[0]}
        if not answered.intersection(self.selected):  # verl would advise to draw other problems
            raise self.no_answers(partition_id, batch_size)
        return self.selected, *snapshots

    def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot):
        """As verl's, in the order of the keys and not of arrival."""
        batch = super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)
        if partition_id != "val":
            batch.reorder(sorted(range(len(batch)), key=lambda n: order_of_key(batch.keys[n])))
        return batch

    def _evict_terminal_groups(self, global_steps, partition_id, eviction_reasons):
        self.thrown_away.update(eviction_reasons[3])
        self.failed += len(eviction_reasons[2])
        return super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)


def check_refill(thrown_away: Counter, failed: int, config: DictConfig, step: int, sigma: float) -> None:
    """Raise TrainingError before a refill where this step has already thrown away as many groups as a recipe allows.

    `failed` groups, of which there is no answer, count by themselves.

    verl's own limit (`algorithm.filter_groups.max_num_gen_batches`) is ignored by its V1 trainer, which would draw
    prompts for ever; here it holds, in batches of `data.train_batch_size` groups.
    """
    rule = config.algorithm.filter_groups
    limit, name = rule.max_num_gen_batches * config.data.train_batch_size, "algorithm.filter_groups.max_num_gen_batches"
    if limit and failed >= limit:
        raise TrainingError(
            f"step {step}: generation or reward of {failed} groups failed (limit {name}={rule.max_num_gen_batches}): "
            "what they stumbled over is in training.log"
        )
    count = thrown_away.total()
    if count < limit or not count:
        return
    mean = sum(value * times for value, times in thrown_away.items()) / count
    raise TrainingError(
        f"step {step}: {count} groups had no variance in {rule.metric} and were thrown away (σ {sigma:g}, mean "
        f"{rule.metric} {mean:.3f}, limit {name}={rule.max_num_gen_batches}): "
        f"{remedy(sigma, mean, parse_aqn(config).noise)}"
    )


def remedy(sigma: float, mean: float, noise: NoiseConfig) -> str:
    """What to do where rewards do not differ, in a step of `sigma` and mean reward `mean`."""
    if mean > 0.5:
        return "give harder prompts"
    prompts = "give easier prompts (worked examples help)"
    if sigma == 0:
        return prompts
    if noise.target_kl is not None:
        return f"lower aqn.noise.target_kl ({noise.target_kl:g} nats a token), or {prompts}"
    return (
        f"lower aqn.noise.sigma_start ({noise.sigma_start:g} {noise.unit}; `verl-aqn probe` shows what each σ leaves), "
        f"set aqn.noise.target_kl=0.1 to have it found, or {prompts}"
    )


def count_groups(uids: list[str], rewards: list[float]) -> tuple[int, int]:
    """`(groups, those whose rewards are all equal)`; a sample whose group has no other is not a group."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for uid, reward in zip(uids, rewards, strict=True):
        by_group[uid].append(reward)
    groups = [found for found in by_group.values() if len(found) > 1]
    return len(groups), sum(min(found) == max(found) for found in groups)
