"""What vLLM makes of an exported folder, held against the run and against the bare base."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.errors import EnvironmentFault, EvidenceError
from verl_aqn.evaluation.export.difference import first_difference
from verl_aqn.evaluation.export.effect import Effect, measure
from verl_aqn.evaluation.export.export_engine import ask_vllm
from verl_aqn.evaluation.export.questions import Questions
from verl_aqn.evaluation.export.source import Source
from verl_aqn.evaluation.export.trained_model import Reference, ask_trainer, free_memory

# The bounds of answers, chosen between right and wrong exports (README, Export).
EQUAL = 0.6  # share of the telling answers that must be the expected ones
TELLING = 8  # fewer decide nothing
SHORT = 64  # tokens; a longer answer comes past many near ties, and says little by being equal or not
TIE_ADAPTER = 0.25  # nats; the run's own answers, by the same arithmetic
TIE_OTHER = 0.5  # answers of the trainer's model, which is another implementation
RECORDED = "the run's recorded validation"
TRAINER = "the trainer's model"


@dataclass(frozen=True)
class Differing:
    """An answer that is not the expected one. `gap`: see `Difference`; at most `bound` of it (nats) is a near tie, and
    None is no bound: a merged model has lost a part of the adapter to rounding."""

    prompt: int
    token: int
    gap: float | None
    bound: float | None
    expected: str
    answer: str

    @property
    def near(self) -> bool:
        """Whether it parts at a near tie, or, without a bound, at a number at all."""
        return _within(self.gap, self.bound) if self.bound is not None else not math.isnan(self.gap or 0.0)


@dataclass(frozen=True)
class Trial:
    """What was asked and how it went.

    `equal` of `prompts` greedy answers are those of `against`: the first `recorded` prompts have answers of the run on
    record, the others those of the trainer's model. `base_equal`: the same of the bare base. `telling` prompts have a
    short answer (`SHORT`) that the base does not give; to `telling_equal` of them the export gives it. `effect`: None
    where the trainer's model does not fit on one device. `undecided`: why the trial cannot tell export and bare
    base apart; empty where it can, and the export passed.
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

    @property
    def required(self) -> int | None:
        """How many of the `telling` answers must be the expected ones. None where they are too few, and for a merged
        model: what rounding took from the adapter takes answers too."""
        if self.merged or self.telling < TELLING:
            return None
        return math.ceil(EQUAL * self.telling)

    def to_dict(self) -> dict[str, Any]:
        """For the record. `required` and `effect.allowed`: the bounds that held; None where there was none."""
        effect = self.effect and asdict(self.effect) | {"allowed": self.effect.allowed}
        return asdict(self) | {"required": self.required, "effect": effect}


def try_out(
    source: Source, questions: Questions, adapter: Adapter, folder: Path, merged: bool, tokenizer: Any
) -> Trial:
    """Let the trainer's model, and then vLLM with ``folder`` and with the bare base, answer and score the prompts.

    ``adapter`` is that of the checkpoint; ``folder`` a PEFT folder over the run's base, or a merged model.

    Raises:
        EnvironmentFault: vLLM did not answer, or the trainer's model has no room and no answer is on record.
        EvidenceError: a log-probability is missing or no number.
    """
    prompts, recorded = questions.prompts, len(questions.answers)
    reference: Reference | None
    try:
        reference = ask_trainer(source, questions, adapter, merged, tokenizer)
    except torch.OutOfMemoryError as error:
        if not recorded:
            raise EnvironmentFault(
                f"the trainer's model of {source.base} does not fit on one device, and no answer of the run is on "
                "record: export on a larger device"
            ) from error
        reference, prompts = None, prompts[:recorded]
    free_memory()
    texts = reference.texts if reference else questions.answers
    scored = reference.answers if reference else [[] for _ in prompts]
    if merged:
        (export,) = ask_vllm(source.config, folder, [None], prompts, texts, scored, of_run=False)
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
    )


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
    """Whose answers the first `recorded` of `prompts` were held against, and the others."""
    if recorded == prompts:
        return RECORDED
    if not recorded:
        return f"{TRAINER} (no greedy validation of this step is on record)"
    return f"{RECORDED} ({recorded}) and of {TRAINER} ({prompts - recorded})"


def judge(trial: Trial, apart: float) -> Trial:
    """The trial, with `undecided` where neither answers nor log-probabilities tell the export from the bare base.

    ``apart``: how far vLLM and the trainer's model may be apart on the bare base, mean nats a token.

    Raises:
        EvidenceError: an answer parts where there is no near tie, too few answers are equal, the export does not do to
            log-probabilities what the adapter does, or vLLM's base is not the trainer's.
    """
    far = [one for one in trial.differing if not one.near]
    if far:
        worst = max(far, key=lambda one: _or_infinity(one.gap))
        gap = "far more" if math.isinf(_or_infinity(worst.gap)) else f"{worst.gap:.3g}"
        raise EvidenceError(
            f"{len(far)} of {trial.prompts} answers are not those of {trial.against}: {worst.answer!r} for "
            f"{worst.expected!r}, where token {worst.token} differs by {gap} nats ({worst.bound or 0:g} allowed)"
        )
    if trial.required is not None and trial.telling_equal < trial.required:
        raise EvidenceError(
            f"{trial.telling} of {trial.prompts} answers of {trial.against} are not the bare base's, and the export "
            f"gives only {trial.telling_equal} of these (at least {trial.required} are needed)"
        )
    effect = trial.effect
    if effect is not None and not _within(effect.apart, apart):
        raise EvidenceError(
            f"on the bare base vLLM and the trainer's model are {effect.apart:.2g} nats a token apart (aqn.mismatch.stop "
            f"allows {apart:g}): they do not compute the same model"
        )
    if effect is not None and effect.allowed is not None and not _within(effect.error, effect.allowed):
        raise EvidenceError(
            "the export does not do to log-probabilities what the adapter does: "
            f"{_or_infinity(effect.error):.2f} of its effect is missing or wrong "
            f"({effect.allowed:.2f} allowed; the bare base has 1)"
        )
    if trial.required is not None or (effect is not None and effect.allowed is not None):
        return trial
    return replace(trial, undecided=_why(trial))


def _within(value: float | None, bound: float) -> bool:
    """False for None and NaN too."""
    return value is not None and value <= bound


def _or_infinity(gap: float | None) -> float:
    return math.inf if gap is None or math.isnan(gap) else gap


def _why(trial: Trial) -> str:
    answers = f"the base gives {trial.base_equal} of {trial.prompts} answers as the adapter does"
    if trial.effect is None:
        return f"{answers}, and the trainer's model, whose log-probabilities would tell more, has no room on one device"
    if trial.effect.floor is None:
        return f"{answers}, and the adapter changes no log-probability of them"
    return (
        f"{answers}, and the adapter changes log-probabilities by {trial.effect.size:.2g} nats a token, of which "
        f"{100 * trial.effect.floor:.0f} % lie between vLLM and the trainer's model on equal weights"
    )
