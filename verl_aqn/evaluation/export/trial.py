"""The trial of an exported folder in vLLM, compared with the run and with the bare base."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.packing import is_packed
from verl_aqn.errors import EnvironmentFault, EvidenceError
from verl_aqn.evaluation.export.difference import first_difference
from verl_aqn.evaluation.export.effect import Effect, measure
from verl_aqn.evaluation.export.export_engine import ask_vllm
from verl_aqn.evaluation.export.questions import Questions
from verl_aqn.evaluation.export.source import Source
from verl_aqn.evaluation.export.trained_model import Reference, ask_trainer, free_memory

# Bounds for responses, chosen so that they separate right from wrong exports (README, Export).
EQUAL = 0.6  # share of the telling responses that must equal the expected ones
TELLING = 8  # with fewer telling responses there is no bound
SHORT = 64  # tokens; a longer response contains many near ties, so that equality says little
TIE_ADAPTER = 0.25  # nats; for the run's own responses, which were computed in the same way
TIE_OTHER = 0.5  # nats; for responses of the trainer's model, which is another implementation
RECORDED = "the run's recorded validation"
TRAINER = "the trainer's model"


@dataclass(frozen=True)
class Differing:
    """A response that differs from the expected one.

    `gap`: see `Difference`. A gap of at most `bound` nats is a near tie. None means no bound, for a merged model, which
    has lost a part of the adapter in rounding.
    """

    prompt: int
    token: int
    gap: float | None
    bound: float | None
    expected: str
    answer: str

    @property
    def near(self) -> bool:
        """Whether the response differs at a near tie, or, without a bound, at a gap that is not NaN."""
        return _within(self.gap, self.bound) if self.bound is not None else not math.isnan(self.gap or 0.0)


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    `equal` of `prompts` greedy responses are those of `against`: the first `recorded` prompts have recorded responses
    of the run, the others have responses of the trainer's model. `base_equal`: the same number for the bare base.
    `telling`: the number of prompts with a short response (`SHORT`) that the base does not give; the export gives
    `telling_equal` of these. `effect`: of the exported weights, None if the trainer's model does not fit on one device.
    `undecided`: why the trial cannot distinguish the export from the bare base; empty if it can and the export passed.
    `survived`: for weights rounded to 4 bits, their effect in the trainer's model beside that of the adapter: `shown`
    is the share of the adapter's effect that they have, and `error` what is missing or wrong.
    """

    against: str
    merged: bool
    prompts: int
    recorded: int
    equal: int
    base_equal: int
    telling: int
    telling_equal: int
    differing: list[Differing]
    effect: Effect | None
    undecided: str = ""
    survived: Effect | None = None

    @property
    def required(self) -> int | None:
        """How many of the `telling` responses must equal the expected ones.

        None if there are too few of them, and for a merged model, where rounding of the adapter changes responses.
        """
        if self.merged or self.telling < TELLING:
            return None
        return math.ceil(EQUAL * self.telling)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for the record, with the bounds `required` and `effect.allowed`; None for no bound."""
        effect = self.effect and asdict(self.effect) | {"allowed": self.effect.allowed}
        return asdict(self) | {"required": self.required, "effect": effect}


def try_out(
    source: Source, questions: Questions, adapter: Adapter, folder: Path, merged: bool, tokenizer: Any
) -> Trial:
    """Run and score the prompts in the trainer's model, and then in vLLM with ``folder`` and with the bare base.

    ``adapter`` is that of the checkpoint. ``folder`` is a PEFT folder for the run's base, or a merged model, packed or
    in bf16.

    Raises:
        EnvironmentFault: vLLM did not respond, or the trainer's model does not fit on the device and no response is
            recorded.
        EvidenceError: a log-probability is missing or not a finite number.
    """
    prompts, recorded = questions.prompts, len(questions.answers)
    packed = folder if merged and is_packed(folder) else None
    reference: Reference | None
    try:
        reference = ask_trainer(source, questions, adapter, tokenizer, merged=merged, packed=packed)
    except torch.OutOfMemoryError as error:
        if not recorded:
            raise EnvironmentFault(
                f"the trainer's model of {source.base} does not fit on one device, and the run has no recorded "
                "response: export on a larger device"
            ) from error
        reference, prompts = None, prompts[:recorded]
    free_memory()
    texts = reference.texts if reference else questions.answers
    scored = reference.answers if reference else [[] for _ in prompts]
    if merged:
        with source.in_rollout_format(folder) if packed else nullcontext(folder) as served:
            (export,) = ask_vllm(source.config, served, [None], prompts, texts, scored, of_run=bool(packed))
        (base,) = ask_vllm(source.config, source.served, [None], prompts, texts, scored, of_run=True)
    else:
        export, base = ask_vllm(source.config, source.served, [folder, None], prompts, texts, scored, of_run=True)
    of_base = [answer["text"] == text for answer, text in zip(base["answers"], texts, strict=True)]
    telling = [
        not one and len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= SHORT
        for one, text in zip(of_base, texts, strict=True)
    ]
    equal = [answer["text"] == text for answer, text in zip(export["answers"], texts, strict=True)]
    return Trial(
        against(recorded, len(prompts)),
        merged=merged,
        prompts=len(prompts),
        recorded=recorded,
        equal=sum(equal),
        base_equal=sum(of_base),
        telling=sum(telling),
        telling_equal=sum(one and tells for one, tells in zip(equal, telling, strict=True)),
        differing=list(_differing(export["answers"], texts, 0 if merged else recorded, merged, tokenizer)),
        effect=measure(reference, export["logprobs"], base["logprobs"]) if reference else None,
        survived=_survived(reference) if reference and reference.trained else None,
    )


def _survived(reference: Reference) -> Effect:
    """Measure the exported weights against base and adapter, both in the trainer's model."""
    assert reference.trained
    whole = replace(reference, exported=reference.trained)
    return measure(whole, reference.exported, reference.base)


def _differing(
    answers: list[dict[str, Any]], texts: list[str], recorded: int, merged: bool, tokenizer: Any
) -> Iterable[Differing]:
    for number, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        if answer["text"] == text:
            continue
        tops = [{int(token): logprob for token, logprob in place.items()} for place in answer["tops"]]
        where = first_difference(
            answer["tokens"], tops, text, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        )
        bound = None if merged else TIE_ADAPTER if number < recorded else TIE_OTHER
        yield Differing(number, where.token, where.gap, bound, text, answer["text"])


def against(recorded: int, prompts: int) -> str:
    """Return the source of the expected responses: the first `recorded` of `prompts` are recorded by the run."""
    if recorded == prompts:
        return RECORDED
    if not recorded:
        return f"{TRAINER} (the run has no recorded greedy validation of this step)"
    return f"{RECORDED} ({recorded}) and of {TRAINER} ({prompts - recorded})"


def judge(trial: Trial, apart: float) -> Trial:
    """Judge a trial; set `undecided` if neither responses nor log-probabilities distinguish the export from the base.

    ``apart``: the largest allowed mean difference between vLLM and the trainer's model on the bare base, in nats per
    token.

    Raises:
        EvidenceError: a response differs where there is no near tie, too few responses are equal, the effect of the
            export on log-probabilities is not that of the adapter (for weights rounded to 4 bits: not that of these
            weights), the base in vLLM is not that of the trainer, or rounding to 4 bits left nothing of the adapter.
    """
    far = [one for one in trial.differing if not one.near]
    if far:
        worst = max(far, key=lambda one: _or_infinity(one.gap))
        gap = "far more" if math.isinf(_or_infinity(worst.gap)) else f"{worst.gap:.3g}"
        raise EvidenceError(
            f"{len(far)} of {trial.prompts} responses are not those of {trial.against}: {worst.answer!r} instead of "
            f"{worst.expected!r}, where token {worst.token} differs by {gap} nats ({worst.bound or 0:g} allowed)"
        )
    if trial.required is not None and trial.telling_equal < trial.required:
        raise EvidenceError(
            f"{trial.telling} of {trial.prompts} responses of {trial.against} differ from the bare base, and the "
            f"export gives only {trial.telling_equal} of these (at least {trial.required} are needed)"
        )
    effect = trial.effect
    if effect is not None and not _within(effect.apart, apart):
        raise EvidenceError(
            f"on the bare base, vLLM and the trainer's model differ by {effect.apart:.2g} nats per token "
            f"(aqn.mismatch.stop allows {apart:g}): they do not compute the same model"
        )
    survived = trial.survived
    if effect is not None and effect.allowed is not None and not _within(effect.error, effect.allowed):
        whose = "the effect of its own weights" if survived else "the adapter's effect"
        raise EvidenceError(
            f"the export does not have {whose} on log-probabilities: "
            f"{_or_infinity(effect.error):.2f} of the effect is missing or wrong "
            f"({effect.allowed:.2f} allowed; the bare base has 1)"
        )
    if survived is not None and not (survived.error is not None and survived.error < 1):
        raise EvidenceError(
            f"rounded to 4 bits, the model is no nearer to the trained policy than its base: "
            f"{_or_infinity(survived.error):.2f} of the adapter's effect on log-probabilities is missing or wrong (the "
            "base has 1): export the adapter, or --merge in bf16"
        )
    if trial.required is not None or (effect is not None and effect.allowed is not None):
        return trial
    return replace(trial, undecided=_why(trial))


def _within(value: float | None, bound: float) -> bool:
    """Return whether a value is at most `bound`; False for None and NaN."""
    return value is not None and value <= bound


def _or_infinity(gap: float | None) -> float:
    return math.inf if gap is None or math.isnan(gap) else gap


def _why(trial: Trial) -> str:
    answers = f"the base gives {trial.base_equal} of {trial.prompts} responses as the adapter does"
    if trial.effect is None:
        return f"{answers}, and the trainer's model, whose log-probabilities would help, does not fit on one device"
    if trial.effect.floor is None:
        return f"{answers}, and the adapter changes no log-probability of them"
    return (
        f"{answers}, and the adapter changes log-probabilities by {trial.effect.size:.2g} nats per token; the "
        f"difference of vLLM and the trainer's model with equal weights is {100 * trial.effect.floor:.0f} % of this"
    )
