"""Tiny random models of transformers families with different layouts, each made in well under a second.

``FAMILIES`` maps a name to a builder. `make` writes the model's folder as ``save_pretrained`` does, with the hub's
names. Every K is a multiple of 32, one MXFP4 block. No weight is close to zero, norms included.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_IDS,
}
_FOUR = _BASE | {"num_hidden_layers": 4}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MLA: dict[str, Any] = {
    **_MOE,
    **_BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {}


def _family(name: str, config: str, cls: str | None = None, **settings: Any) -> None:
    def build() -> PreTrainedModel:
        made = getattr(transformers, config)(**settings)
        return getattr(transformers, cls)(made) if cls else AutoModelForCausalLM.from_config(made)

    FAMILIES[name] = build


_family("llama_tied", "LlamaConfig", tie_word_embeddings=True, **_BASE)
_family("llama_untied", "LlamaConfig", tie_word_embeddings=False, **_BASE)
_family("qwen3_moe", "Qwen3MoeConfig", head_dim=16, num_experts=4, **_MOE, **_BASE)
_family("mixtral", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **_BASE)
_family("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", **_GEMMA, **_FOUR)
_family(
    "gemma4",
    "Gemma4TextConfig",
    "Gemma4ForCausalLM",
    head_dim=16,
    global_head_dim=16,
    sliding_window=8,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=96,
    num_kv_shared_layers=0,
    **(_BASE | {"num_hidden_layers": 6}),
)
_family("phi3", "Phi3Config", **_BASE)
_family("olmo3", "Olmo3Config", sliding_window=8, **_FOUR)
_family("glm4", "Glm4Config", head_dim=16, attention_bias=True, **_BASE)
_family("gpt_oss", "GptOssConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, **_BASE)
_family("deepseek_v2", "DeepseekV2Config", topk_method="greedy", **_MLA)
_family("deepseek_v3", "DeepseekV3Config", num_nextn_predict_layers=0, **_MLA)
_family("qwen3_next", "Qwen3NextConfig", num_experts=4, shared_expert_intermediate_size=32, **_MOE, **_LINEAR, **_FOUR)
_family("qwen3_5", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **_LINEAR, **_FOUR)
_family(
    "qwen3_5_moe",
    "Qwen3_5MoeTextConfig",
    "Qwen3_5MoeForCausalLM",
    num_experts=4,
    shared_expert_intermediate_size=32,
    **_MOE,
    **_LINEAR,
    **_FOUR,
)
_family(
    "granitemoehybrid",
    "GraniteMoeHybridConfig",
    layer_types=["mamba", "attention"],
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    num_local_experts=0,
    num_experts_per_tok=0,
    shared_intermediate_size=96,
    **_BASE,
)
_family(
    "falcon_h1",
    "FalconH1Config",
    head_dim=16,
    mamba_d_ssm=128,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_n_groups=1,
    **_BASE,
)
_family(
    "nemotron_h",
    "NemotronHConfig",
    hybrid_override_pattern="M-*-",
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=1,
    **_FOUR,
)
_family("lfm2", "Lfm2Config", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, **_BASE)
_family("cohere2", "Cohere2Config", sliding_window=8, **_FOUR)
_family("starcoder2", "Starcoder2Config", sliding_window=None, **_BASE)
_family("gpt_neox", "GPTNeoXConfig", **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"})
# Multimodal models, whose text part is trained.
_family(
    "gemma3_vl",
    "Gemma3Config",
    "Gemma3ForConditionalGeneration",
    text_config={**_GEMMA, **_BASE},
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    mm_tokens_per_image=4,
    image_token_index=5,
    boi_token_index=6,
    eoi_token_index=7,
    **_IDS,
)
_family(
    "qwen3_5_vl",
    "Qwen3_5Config",
    "Qwen3_5ForConditionalGeneration",
    text_config={**_LINEAR, **_FOUR},
    vision_config=_VISION,
    **_TOKENS,
)
_family(
    "qwen2_5_vl",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    text_config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        **_BASE,
    },
    vision_config=_VISION,
    **_TOKENS,
    **_IDS,
)
REFUSED = {"qwen2_5_vl"}
"""Families that are refused: transformers has no causal LM for their text part."""


def make(name: str, folder: Path) -> Path:
    """Write the family's model, random and in bf16, into ``folder``."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    with torch.no_grad():
        for of, parameter in model.named_parameters():
            leaf = of.rpartition(".")[2]
            if parameter.dim() >= 2 and "conv" not in of:
                rows = parameter.shape[-2] if name == "gpt_oss" and parameter.dim() == 3 else parameter.shape[-1]
                parameter.normal_(std=1 / math.sqrt(rows))
            elif "bias" in leaf:
                parameter.normal_(std=0.1)
            elif "norm" in of and leaf == "weight":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
