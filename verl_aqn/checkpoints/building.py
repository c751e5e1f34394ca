"""Building of models from a config.json, without weights: the causal LM that is trained, and the whole model."""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from verl_aqn.checkpoints.storage import read_config
from verl_aqn.errors import ModelError, first_line

# Biases that only choose experts; vLLM has them in float32. Those of GLM-5.2 are between 6.82 and 7.06. There bfloat16
# has 8 values, and rounding sends 98 % of the tokens to other experts (sgl-project/sglang, pull request 37133).
_EXPERT_BIASES = ("e_score_correction_bias", "expert_bias")


class Built(NamedTuple):
    """The models of a folder, with parameters on meta and real buffers."""

    model: PreTrainedModel
    """The causal language model that is trained: the text part of a multimodal folder."""
    whole: PreTrainedModel
    """The model that the folder's tensors belong to: ``model`` itself unless the folder is multimodal."""


def build(path: Path, dtype: torch.dtype = torch.bfloat16, attn_implementation: str | None = "eager") -> Built:
    """Build the models that ``path/config.json`` describes, unquantised.

    The default is eager attention, which every architecture has and which is enough if only the structure is needed.
    The text part of a multimodal folder is the causal LM that transformers has for the text config. Its weights have
    the same shapes and the same meaning as in the whole model.

    Raises:
        ModelError: transformers cannot build the model, or has no causal LM for its text part.
    """
    from accelerate import init_empty_weights

    config = config_of(path)

    def from_config(auto: Any, config: Any) -> PreTrainedModel:
        build_model = getattr(auto, "from_config", None) or auto._from_config
        with init_empty_weights(include_buffers=False):
            return build_model(config, dtype=dtype, attn_implementation=attn_implementation)

    try:
        text = config.get_text_config()
        if text is config:
            model = from_config(AutoModelForCausalLM, config)
            return Built(model, model)
        if type(text) not in AutoModelForCausalLM._model_mapping:
            raise ModelError(
                f"{path / 'config.json'}: transformers has no causal language model for the text part "
                f"({text.model_type}) of {config.model_type}: start from a text-only checkpoint"
            )
        whole = from_config(_whole_class(config), copy.deepcopy(config))
        text = copy.deepcopy(text)
        head = whole.get_output_embeddings()
        text.tie_word_embeddings = any(whole.get_submodule(n.rpartition(".")[0]) is head for n in _tied(whole))
        return Built(from_config(AutoModelForCausalLM, text), whole)
    except ModelError:
        raise
    except (ValueError, KeyError, OSError, ImportError) as error:
        file = path / "config.json"
        raise ModelError(f"transformers cannot build the model of {file}: {first_line(error)}") from error


def empty_model(path: Path, dtype: torch.dtype = torch.bfloat16, attn_implementation: str = "eager") -> PreTrainedModel:
    """Build only the causal language model that ``build`` returns."""
    return build(path, dtype, attn_implementation).model


def stays_float32(model: PreTrainedModel, name: str) -> bool:
    """Return whether tensor ``name`` of ``model`` stays in float32 when the other tensors are bfloat16."""
    patterns = (*_EXPERT_BIASES, *(model._keep_in_fp32_modules_strict or ()))
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)  # as transformers matches them


def is_multimodal(path: Path) -> bool:
    """Return whether the text model is only one part of the folder's model.

    Raises:
        ModelError: transformers does not know the config.
    """
    config = config_of(path)
    return config.get_text_config() is not config


def config_of(path: Path) -> Any:
    """Read the folder's config as transformers does, without the quantisation config."""
    read_config(path)  # for a missing folder transformers would ask the hub
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError, ImportError) as error:
        file = path / "config.json"
        raise ModelError(f"transformers cannot build the model of {file}: {first_line(error)}") from error
    config.__dict__.pop("quantization_config", None)  # otherwise transformers' own quantiser would start
    return config


def text_prefixes(built: Built) -> dict[str, str]:
    """Return {name in ``whole``: name in ``model``} for the parts that both have (decoder, head).

    Raises:
        ModelError: ``whole`` does not have exactly one text part.
    """
    model, whole = built
    decoders = [name for name, module in whole.named_modules() if type(module) is type(model.base_model)]
    head, ours = whole.get_output_embeddings(), model.get_output_embeddings()
    if len(decoders) != 1 or head is None or ours is None:
        raise ModelError(
            f"cannot find the text part {type(model.base_model).__name__} in {type(whole).__name__}: start from a "
            "text-only checkpoint"
        )
    return {decoders[0]: model.base_model_prefix, _name_of(whole, head): _name_of(model, ours)}


def _name_of(model: PreTrainedModel, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _tied(model: PreTrainedModel) -> list[str]:
    return list(model.all_tied_weights_keys)


def _whole_class(config: Any) -> Any:
    """Return the model class that the config names, or else the one that transformers chooses for the config."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModelForImageTextToText


def linear_layers(folder: Path) -> list[str]:
    """Names of the linear layers to which PEFT's `all-linear` gives adapters; only config.json is read."""
    from torch import nn

    model = empty_model(folder)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
