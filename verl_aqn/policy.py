"""A recipe's policy in plain transformers, where an engine would be too much to start; `generate` has it answer."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl_aqn.config import parse_aqn
from verl_aqn.mxfp4.checkpoint import is_packed
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.mxfp4.model import load_model


def load_base(config: DictConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base, which computes in `dtype`, on the CPU or on the accelerator that the recipe's profile names."""
    aqn, path = parse_aqn(config), Path(config.actor_rollout_ref.model.path)
    device = "cpu" if aqn.profile in ("cpu", "auto") else aqn.profile
    if not is_packed(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    model = load_model(path, dtype, device)
    for layer in packed_layers(model):
        layer.activation = Activation.parse(aqn.mxfp4.activation_arithmetic)
    return model.eval()


def prompt_tokens(config: DictConfig, tokenizer: Any, messages: list[dict[str, str]]) -> list[int] | None:
    """A prompt as the rollout gets it; None where it is longer than `data.max_prompt_length`: verl leaves those out."""
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if len(ids) <= config.data.max_prompt_length else None


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Each of them ends an answer: the tokenizer's and those of the model's generation config."""
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
