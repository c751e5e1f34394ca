"""The reference for an export: the trainer's model with the adapter of the checkpoint, never with exported files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.evaluation.export.questions import Questions, training_prompts
from verl_aqn.evaluation.export.source import Source
from verl_aqn.models.generate import generate, greedy
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.preflight.policy import end_tokens, load_base

Logprobs = list[list[float]]
"""Natural logarithms, [response][token]."""
TOGETHER = 1024
CALIBRATION_PROMPTS = 128


@dataclass(frozen=True)
class Reference:
    """Responses and log-probabilities of the trainer's model.

    `answers`: the tokens of a response to each prompt (the recorded response of the run if there is one, else this
    model's greedy one). `texts`: the same as text. `base`, `exported`: the log-probabilities of these tokens in the
    base and in the exported model. `trained`: those of base and adapter, if the exported model is rounded to 4 bits.
    """

    answers: list[list[int]]
    texts: list[str]
    base: Logprobs
    exported: Logprobs
    trained: Logprobs | None = None


@torch.no_grad()
def ask_trainer(
    source: Source,
    questions: Questions,
    adapter: Adapter,
    tokenizer: Any,
    *,
    merged: bool = False,
    packed: Path | None = None,
) -> Reference:
    """Compute responses and log-probabilities of the actor's model: base and adapter in PEFT, in bf16, without noise.

    With ``merged`` the exported model is the base with scaling·B·A added to its weights and rounded once. With
    ``packed`` it is the model in this folder, in place of the base.
    """
    base = load_base(source.config, torch.bfloat16)
    model = with_adapter(base, adapter)
    recorded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in questions.answers]
    further = questions.prompts[len(recorded) :]
    answers = [*recorded, *_greedy(source, model, base, further, tokenizer)]
    texts = [*questions.answers, *(tokenizer.decode(ids, skip_special_tokens=True) for ids in answers[len(recorded) :])]
    with model.disable_adapter():
        of_base = logprobs(model, questions.prompts, answers)
    if packed:
        trained = logprobs(model, questions.prompts, answers)
        model = load_base(source.with_base(packed), torch.bfloat16)
        return Reference(answers, texts, of_base, logprobs(model, questions.prompts, answers), trained)
    if merged:
        model = merge(model, adapter)
    return Reference(answers, texts, of_base, logprobs(model, questions.prompts, answers))


@torch.no_grad()
def calibration_rows(source: Source, adapter: Adapter, tokenizer: Any) -> Tensor:
    """Return training prompts with the greedy responses of the actor's model as tokens, int64 [S, L].

    There are `CALIBRATION_PROMPTS` prompts, one after the other and cut to rows as long as the longest of them with its
    response, so that there is no padding.
    """
    prompts = training_prompts(source.config, tokenizer, CALIBRATION_PROMPTS)
    base = load_base(source.config, torch.bfloat16)
    answers = _greedy(source, with_adapter(base, adapter), base, prompts, tokenizer)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    tokens = torch.tensor([token for text in texts for token in text])
    return tokens[: len(tokens) // longest * longest].view(-1, longest)


def _greedy(source: Source, model: Any, base: Any, prompts: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """Return the greedy response of ``model`` to each prompt, at most as long as in the run."""
    if not prompts:
        return []
    length = int(source.config.actor_rollout_ref.rollout.response_length)
    return [ids for (ids,) in generate(model, prompts, greedy, end_tokens(base, tokenizer), length)]


def free_memory() -> None:
    """Release cached memory of an accelerator, so that vLLM can use it in another process."""
    for name in ("cuda", "npu"):
        device = getattr(torch, name, None)
        if device is not None and device.is_available():
            device.empty_cache()


def with_adapter(base: nn.Module, adapter: Adapter) -> Any:
    """Wrap ``base`` with PEFT, with the matrices of ``adapter`` and PEFT's own scaling."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        target_modules=list(adapter.matrices),
        inference_mode=True,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for module, matrices in adapter.matrices.items():
        layer: Any = model.get_base_model().get_submodule(module)
        for part, matrix in zip((layer.lora_A, layer.lora_B), matrices, strict=True):
            weight = part["default"].weight
            weight.data = matrix.to(weight.device)
    return model.eval()


def merge(model: Any, adapter: Adapter) -> nn.Module:
    """Return the base of ``model`` with plain layers of W + scaling·B·A instead of the adapted ones.

    As in a merged folder, activations are not rounded.
    """
    base = model.unload()
    for module in adapter.matrices:
        layer = base.get_submodule(module)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        delta = adapter.delta(module).to(layer.weight.device)
        plain.weight = nn.Parameter((layer.weight.float() + delta).bfloat16(), requires_grad=False)
        plain.bias = layer.bias
        base.set_submodule(module, plain)
    for layer in packed_layers(base):
        layer.activation = Activation.parse("none")
    return base


def logprobs(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Logprobs:
    """Compute the log-probabilities of each response's tokens after its prompt, [response][token] in float32.

    About `TOGETHER` tokens are computed at a time. Rows are padded on the right, where no token attends to the padding.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    together = max(1, TOGETHER // max(map(len, rows)))
    found = []
    for first in range(0, len(rows), together):
        batch = rows[first : first + together]
        longest = max(map(len, batch))
        filled = [row + [0] * (longest - len(row)) for row in batch]
        tokens = torch.tensor(filled, device=next(model.parameters()).device)
        logits: Tensor = model(tokens, use_cache=False).logits
        for number, row in enumerate(batch, start=first):
            start = len(prompts[number])
            own = logits[number - first, start - 1 : len(row) - 1].float()
            wanted = tokens[number - first, start : len(row), None]
            found.append((own.gather(-1, wanted)[:, 0] - own.logsumexp(-1)).tolist())
    return found
