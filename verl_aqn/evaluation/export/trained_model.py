"""The reference for an export: the trainer's model with the adapter of the checkpoint, never with exported files."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.evaluation.export.questions import Questions
from verl_aqn.evaluation.export.source import Source
from verl_aqn.models.generate import generate, greedy
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.preflight.policy import end_tokens, load_base

Logprobs = list[list[float]]
"""Natural logarithms, [response][token]."""
TOGETHER = 1024


@dataclass(frozen=True)
class Reference:
    """Responses and log-probabilities of the trainer's model.

    `answers`: the tokens of a response to each prompt (the recorded response of the run if there is one, else this
    model's greedy one). `texts`: the same as text. `base`, `exported`: the log-probabilities of these tokens in the
    base and in the exported model.
    """

    answers: list[list[int]]
    texts: list[str]
    base: Logprobs
    exported: Logprobs


@torch.no_grad()
def ask_trainer(source: Source, questions: Questions, adapter: Adapter, merged: bool, tokenizer: Any) -> Reference:
    """Compute responses and log-probabilities of the actor's model: base and adapter in PEFT, in bf16, without noise.

    With ``merged`` the exported model is the base with scaling·B·A added to its weights and rounded once.
    """
    base = load_base(source.config, torch.bfloat16)
    model = with_adapter(base, adapter)
    recorded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in questions.answers]
    length = int(source.config.actor_rollout_ref.rollout.response_length)
    made = []
    if further := questions.prompts[len(recorded) :]:
        made = [ids for (ids,) in generate(model, further, greedy, end_tokens(base, tokenizer), length)]
    answers = [*recorded, *made]
    texts = [*questions.answers, *(tokenizer.decode(ids, skip_special_tokens=True) for ids in made)]
    with model.disable_adapter():
        of_base = logprobs(model, questions.prompts, answers)
    if merged:
        model = merge(model, adapter)
    return Reference(answers, texts, of_base, logprobs(model, questions.prompts, answers))


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
