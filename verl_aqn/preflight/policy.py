"""The policy of a recipe in plain transformers, without an inference engine; `generate` samples responses from it."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer, PreTrainedModel

from verl_aqn.checkpoints.loading import load_dense, load_model
from verl_aqn.checkpoints.packing import is_packed
from verl_aqn.config.schema import parse_aqn
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation


def load_base(config: DictConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base with `dtype` as compute dtype, on the CPU or on the accelerator that the recipe's profile names."""
    aqn, path = parse_aqn(config), Path(config.actor_rollout_ref.model.path)
    device = "cpu" if aqn.profile in ("cpu", "auto") else aqn.profile
    if not is_packed(path):
        return load_dense(path, dtype, device=device)
    model = load_model(path, dtype, device)
    for layer in packed_layers(model):
        layer.activation = Activation.parse(aqn.mxfp4.activation_arithmetic)
    return model.eval()


def load_tokenizer(config: DictConfig, folder: Path) -> Any:
    """Load the tokenizer in `folder` with the chat template that renders the prompts of the run."""
    model = config.actor_rollout_ref.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model.get("custom_chat_template") is not None:
        tokenizer.chat_template = model.custom_chat_template
    return tokenizer


def prompt_tokens(config: DictConfig, tokenizer: Any, messages: list[dict[str, str]]) -> list[int] | None:
    """Return the token ids of a prompt as the rollout receives it, or None if verl leaves the prompt out.

    verl leaves out prompts that cannot be rendered or are longer than `data.max_prompt_length`. Without
    `data.filter_overlong_prompts` verl cuts off the beginning of a long prompt instead.
    """
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception:  # a chat template may raise any error for messages that it does not support
        return None
    ids, limit = tokenizer(text, add_special_tokens=False)["input_ids"], int(config.data.max_prompt_length)
    if len(ids) > limit:
        return None if config.data.filter_overlong_prompts else ids[-limit:]
    return ids


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Return the EOS token ids of the tokenizer and of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
