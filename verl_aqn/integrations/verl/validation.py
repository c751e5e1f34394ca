"""Validation: every problem of the set gets one or several responses, and every response is recorded by its place."""

from collections import Counter
from functools import cached_property

from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError
from verl_aqn.integrations.verl.failures import failure_text, refuse_failures
from verl_aqn.integrations.verl.keyed import KeyedTrainer
from verl_aqn.runs.accuracy import REMEDY, judged
from verl_aqn.runs.request_seeds import last_outputs
from verl_aqn.runs.stats.passk import mean_pass
from verl_aqn.tasks import math_verify
from verl_aqn.tasks.gsm8k import number

RULES = {"accuracy": "acc", "flexible": "flexible", "math_verify": "math_verify"}
"""Names of the shares in the record of a validation, with the column of the responses that each one uses."""


class ValidatingTrainer(KeyedTrainer):
    """A trainer that records verl's validation.

    `validation/<step>.jsonl` has a line for each response, in the order of `item` (row of the validation set) and
    `sample` (0 to n - 1); metrics.jsonl has the shares of right responses. Both cover `items` × `samples` responses. A
    missing response (its session failed) has no line, counts as wrong, and is reported. If a session has several
    outputs, the last one is the response.
    """

    shares: dict[str, float]  # share of right responses in the last validation, by rule
    pass_at: dict[str, float]  # probability that at least one of k responses is right, by k
    failed: int  # number of missing responses
    requested: int = 0  # number of responses requested in this step, with refills
    by_source: dict[str, dict[str, float]]  # problems and shares of each data source; {} if there is only one

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()
        for lines_on_disk in self._dump_futures:  # finish these files before the record that refers to them
            lines_on_disk.result()
        items, samples = len(self.val_dataset), self.samples
        sizes = {"items": items, "samples": samples, "pass_at": self.pass_at}
        sizes |= {"answered": items * samples - self.failed, "failed": self.failed}
        if self.by_source:
            sizes["by_source"] = self.by_source
        self.folder.append("metrics.jsonl", {"kind": "validation", "step": self.global_steps, **self.shares, **sizes})
        several = {f"pass_at_{k}": share for k, share in self.pass_at.items() if k != "1"}
        return metrics | {f"aqn/validation/{name}": share for name, share in (self.shares | several).items()}

    @property
    def samples(self) -> int:
        """Return the number of responses to each problem of the validation set."""
        return self.config.actor_rollout_ref.rollout.val_kwargs.n

    @cached_property
    def sources(self) -> list[str]:
        """Return the data source of each problem of the validation set."""
        items = (self.val_dataset[place] for place in range(len(self.val_dataset)))
        return [str(item.get("data_source")) if isinstance(item, dict) else "" for item in items]

    def _dump_generations(self, inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path):
        if dump_path != self.config.trainer.validation_data_dir:
            return super()._dump_generations(inputs, outputs, gts, scores, reward_extra_infos_dict, dump_path)
        if "acc" not in reward_extra_infos_dict:
            raise ConfigError(f"reward.custom_reward_function returns no accuracy: {REMEDY}")
        places = places_of(reward_extra_infos_dict["uid"], self.agent_loop_manager.row_of)
        inputs, outputs, gts, scores = (
            [values[at] for at in places.values()] for values in (inputs, outputs, gts, scores)
        )
        columns = {
            name: [values[at] for at in places.values()]
            for name, values in reward_extra_infos_dict.items()
            if name != "uid"
        }
        columns |= {"item": [item for item, _ in places], "sample": [sample for _, sample in places]}
        # math-verify is used only if all ground truths are numbers.
        if all(number(truth) is not None for truth in gts):
            columns["math_verify"] = math_verify.scores(outputs, [str(truth) for truth in gts])
        self.count_right(columns)
        super()._dump_generations(inputs, outputs, gts, scores, columns, dump_path)

    def count_right(self, columns: dict[str, list]) -> None:
        """Set the shares of right responses, by rule and as pass@k, and report missing responses."""
        items, wanted = len(self.val_dataset), len(self.val_dataset) * self.samples
        # The shares are over all problems of all data sources; a missing response (its session failed) is wrong.
        right_by = {name: judged(columns[rule], rule) for name, rule in RULES.items() if rule in columns}
        self.shares = {name: sum(right) / wanted for name, right in right_by.items()}
        self.by_source = shares_by_source(self.sources, columns["item"], right_by, self.samples)
        solved = Counter(item for item, one in zip(columns["item"], right_by["accuracy"], strict=True) if one)
        passed = mean_pass([solved[item] for item in range(items)], self.samples)
        self.pass_at = {str(k): share for k, share in passed.items()}
        self.failed = wanted - len(columns["item"])
        self.tell_failed("val", wanted, self.failed)

    def refuse_failed(self, part: str, missing: int = 0) -> None:
        """Stop the run if more responses of this step or validation failed than it allows. `part`: train or val.

        `missing`: the number of missing responses, if it is known.

        Raises:
            RewardError, ProcessFault: as `refuse_failures`.
        """
        rollout, allowed = self.config.actor_rollout_ref.rollout, parse_aqn(self.config).run.allow_failed
        if part == "val":
            requested = len(self.val_dataset) * self.samples
        else:
            requested = max(self.requested, self.config.data.train_batch_size * rollout.n)
        refuse_failures(self.folder, part, self.global_steps, requested, allowed, missing)

    def tell_failed(self, part: str, requested: int, failed: int) -> None:
        """Stop the run for missing responses, or warn if the run allows that many. `part`: train or val.

        Raises:
            RewardError, ProcessFault: as `refuse_failures`.
        """
        self.refuse_failed(part, failed)
        if failed:
            counted = "they count as wrong" if part == "val" else "their groups are smaller"
            text = f"{failure_text(self.folder, part, self.global_steps, requested, failed)}; {counted}"
            self.folder.append("events.jsonl", {"kind": "warning", "text": text})


def shares_by_source(
    sources: list[str], items: list[int], right_by: dict[str, list[bool]], samples: int
) -> dict[str, dict[str, float]]:
    """Return, for each data source, its number of problems (`items`) and the share of right responses by rule.

    Return {} if there is only one source. Missing responses count as wrong.

    Args:
        sources: the source of each problem. items: the problem of each response.
        right_by: whether each response is right, by rule. samples: number of responses requested for each problem.
    """
    counts = Counter(sources)
    if len(counts) < 2:
        return {}
    found: dict[str, dict[str, float]] = {source: {"items": count} for source, count in sorted(counts.items())}
    for rule, right in right_by.items():
        solved = Counter(sources[item] for item, one in zip(items, right, strict=True) if one)
        for source, count in counts.items():
            found[source][rule] = solved[source] / (count * samples)
    return found


def places_of(keys: list[str], row_of: dict[str, int]) -> dict[tuple[int, int], int]:
    """Return {(item, sample): index in `keys` of its response} in the order of item and sample.

    Args:
        keys: verl's keys, UID_SESSION_INDEX. row_of: row of the validation set by uid.
    """
    return dict(sorted(((row_of[uid], sample), at) for (uid, sample), at in last_outputs(keys).items()))
