"""Greedy answers of an exported folder, held against those of the run."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl_aqn.errors import EvidenceError
from verl_aqn.export.difference import first_difference
from verl_aqn.export.engine import greedy_answers
from verl_aqn.export.questions import Questions
from verl_aqn.export.source import Source
from verl_aqn.generate import generate, greedy
from verl_aqn.policy import end_tokens, load_base
from verl_aqn.serving import SERVED

# How far from a tie the first differing token may be, in nats. Measured on 192 recorded answers of SmolLM2-135M after 5
# steps: the adapter answers all of them as the run did; merged to bf16, 21 differ by up to 1.25 (the base without
# adapter: 68, by up to 6.4). The logits there are 16 to 32, where bf16 knows steps of 0.125.
TIE_ADAPTER = 0.25
TIE_OTHER = 2.0  # merged, or answers of another implementation
RECORDED = "the run's recorded validation"
TRAINER = "the trainer's model"


@dataclass(frozen=True)
class Differing:
    """An answer that is not the expected one. `gap`: see `Difference`; at most `bound` of it (nats) is a near tie."""

    prompt: int
    token: int
    gap: float | None
    bound: float
    expected: str
    answer: str


@dataclass(frozen=True)
class Trial:
    """`equal` of `prompts` answers are those of `against`: the first `recorded` of the prompts have answers of the run
    on record, the others those of the trainer's model. The others part at a near tie."""

    against: str
    prompts: int
    recorded: int
    equal: int
    differing: list[Differing]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_out(source: Source, questions: Questions, folder: Path, adapter: Path, tokenizer: Any) -> Trial:
    """Let vLLM answer with ``folder``: a PEFT folder over the run's base, or a merged model.

    ``adapter``: a PEFT folder of the same adapter, for the trainer's own model where the run recorded no answers.
    """
    merged = folder != adapter
    recorded = len(questions.answers)
    expected = list(questions.answers)
    if further := questions.prompts[recorded:]:
        expected += trainer_answers(source, further, adapter, tokenizer)
    served = OmegaConf.select(source.config, f"actor_rollout_ref.model.override_config.{SERVED}") or source.base
    model = folder if merged else Path(served)  # the base in the form that the run's rollout had
    found = greedy_answers(source.config, model, None if merged else adapter, questions.prompts, expected)
    differing = []
    for number, (answer, text) in enumerate(zip(found, expected, strict=True)):
        if answer["text"] == text:
            continue
        tops = [{int(token): logprob for token, logprob in place.items()} for place in answer["tops"]]
        where = first_difference(
            answer["tokens"], tops, text, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        )
        bound = TIE_OTHER if merged or number >= recorded else TIE_ADAPTER
        differing.append(Differing(number, where.token, where.gap, bound, text, answer["text"]))
    equal = len(expected) - len(differing)
    return Trial(against(recorded, len(expected)), len(expected), recorded, equal, differing)


def against(recorded: int, prompts: int) -> str:
    """Whose answers the first `recorded` of `prompts` were held against, and the others."""
    if recorded == prompts:
        return RECORDED
    if not recorded:
        return f"{TRAINER} (no greedy validation of this step is on record)"
    return f"{RECORDED} ({recorded}) and of {TRAINER} ({prompts - recorded})"


def check(trial: Trial) -> None:
    """Raise EvidenceError unless every answer is the expected one up to a near tie."""
    far = [d for d in trial.differing if d.gap is None or d.gap > d.bound]
    if far:
        worst = max(far, key=lambda d: float("inf") if d.gap is None else d.gap)
        gap = "far more" if worst.gap is None else f"{worst.gap:.3g}"
        raise EvidenceError(
            f"{len(far)} of {trial.prompts} answers are not those of {trial.against}: {worst.answer!r} for "
            f"{worst.expected!r}, where token {worst.token} differs by {gap} nats ({worst.bound:g} allowed)"
        )


def trainer_answers(source: Source, prompts: list[list[int]], adapter: Path, tokenizer: Any) -> list[str]:
    """Greedy answers of the actor's model: packed base and adapter in plain PEFT, in bf16 and without noise."""
    import torch
    from peft import PeftModel

    base = load_base(source.config, torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False).eval()
    length = int(source.config.actor_rollout_ref.rollout.response_length)
    answers = generate(model, prompts, greedy, end_tokens(base, tokenizer), length)
    return [tokenizer.decode(ids, skip_special_tokens=True) for (ids,) in answers]
