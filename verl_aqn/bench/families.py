"""Tiny random models of common families: one or two layers of each kind, a few million weights.

They are built from transformers' own configuration classes, so that each family is what its code defines, not a copy.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
BASE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    **TOKENS,
}
WINDOW = 64  # shorter than the task's prompts, so that a mask without the window gives wrong results
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LINEAR_ATTENTION = {
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_hidden_layers": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1}
LATENT = {  # multi-head latent attention
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 49152,
    "num_kv_shared_layers": 0,
    "num_hidden_layers": 6,
}
VISION = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "out_hidden_size": 128}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
IMAGE_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Family:
    """One family: transformers' configuration class, the sizes that replace those of `BASE`, and its model class.

    `model`: a class of transformers; None: the class that AutoModelForCausalLM chooses for the configuration. `norm`:
    the typical value of norm weights, 0 if the effective weight is 1 + w. `without`: keys of `BASE` that the family
    lacks.
    """

    config: str
    sizes: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    norm: float = 1.0
    without: tuple[str, ...] = ()

    def build_config(self, **sizes: Any) -> Any:
        """Return the configuration; `sizes` replace those of the family (of its text part, if it has one)."""
        import transformers

        kind = getattr(transformers, self.config)
        text = {key: value for key, value in BASE.items() if key not in self.without}
        if "text_config" in self.sizes:
            merged = {**text, **self.sizes["text_config"], **sizes}
            return kind(**{**self.sizes, "text_config": merged}, **TOKENS)
        return kind(**{**text, **self.sizes, **sizes})


FAMILIES: dict[str, Family] = {
    # full attention
    "qwen2": Family("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama3": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama_k272": Family("LlamaConfig", {"head_dim": 32, "intermediate_size": 272}),  # K not a multiple of 32
    "mistral_full": Family("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "granite": Family(
        "GraniteConfig",
        {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.22, "attention_multiplier": 0.03},
    ),
    "smollm3": Family("SmolLM3Config", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2Config"),
    "glm4": Family("Glm4Config", {"head_dim": 32, "attention_bias": True}),
    "seed_oss": Family("SeedOssConfig", {"head_dim": 32}),
    "hunyuan_dense": Family("HunYuanDenseV1Config", {"head_dim": 32}),
    "ernie4_5": Family("Ernie4_5Config", {"head_dim": 32}),
    # windows and chunks
    "mistral": Family("MistralConfig", {"head_dim": 32, "sliding_window": WINDOW}),
    "ministral": Family("MinistralConfig", {"head_dim": 32, "sliding_window": WINDOW}),
    "qwen2_window": Family(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}
    ),
    "phi3": Family("Phi3Config", {"sliding_window": None}),
    "phi3_window": Family("Phi3Config", {"sliding_window": WINDOW}),
    "gemma2": Family("Gemma2Config", {**GEMMA, "sliding_window": WINDOW}, norm=0.0),
    "gemma3": Family(
        "Gemma3TextConfig", {**GEMMA, "sliding_window": WINDOW, "num_hidden_layers": 6}, "Gemma3ForCausalLM", 0.0
    ),
    "gemma4": Family("Gemma4TextConfig", {**GEMMA4, "sliding_window": WINDOW}, "Gemma4ForCausalLM"),
    "olmo3": Family("Olmo3Config", {"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "exaone4": Family("Exaone4Config", {"sliding_window": WINDOW, "sliding_window_pattern": 4, "num_hidden_layers": 4}),
    "cohere2": Family("Cohere2Config", {"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "intermediate_size": 128,
        },
    ),
    # mixtures of experts
    "qwen3_moe": Family("Qwen3MoeConfig", {"head_dim": 32, "num_experts": 4, **EXPERTS}),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Family("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe": Family("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        {
            "head_dim": 32,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_nextn_predict_layers": 0,
            **ROUTED,
            **EXPERTS,
        },
    ),
    # multi-head latent attention
    "deepseek_v2": Family("DeepseekV2Config", {"topk_method": "greedy", **LATENT, **ROUTED, **EXPERTS}),
    "deepseek_v3": Family("DeepseekV3Config", {"num_nextn_predict_layers": 0, **LATENT, **ROUTED, **EXPERTS}),
    # layers with state
    "qwen3_next": Family(
        "Qwen3NextConfig", {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS, **LINEAR_ATTENTION}
    ),
    "qwen3_5": Family("Qwen3_5TextConfig", LINEAR_ATTENTION, "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig",
        {"num_experts": 4, "shared_expert_intermediate_size": 64, **EXPERTS, **LINEAR_ATTENTION},
        "Qwen3_5MoeForCausalLM",
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            **MAMBA,
        },
    ),
    "falcon_h1": Family("FalconH1Config", {"head_dim": 32, "mamba_d_ssm": 256, **MAMBA}),
    "lfm2": Family(
        "Lfm2Config",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,
            "block_dim": 128,
        },
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            "hybrid_override_pattern": "M-*-",
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 1,
            "num_hidden_layers": 4,
        },
    ),
    # LayerNorm
    "starcoder2": Family("Starcoder2Config", {"sliding_window": None}),
    "gpt_neox": Family("GPTNeoXConfig", without=("num_key_value_heads",)),
    "cohere": Family("CohereConfig"),
    # multimodal models, whose text part is trained
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig",
        {
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
            "vision_config": VISION,
            **IMAGE_TOKENS,
        },
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_5_vl": Family(
        "Qwen3_5Config",
        {"text_config": LINEAR_ATTENTION, "vision_config": VISION, **IMAGE_TOKENS},
        "Qwen3_5ForConditionalGeneration",
    ),
    "gemma3_vl": Family(
        "Gemma3Config",
        {
            "text_config": {**GEMMA, "sliding_window": WINDOW},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        "Gemma3ForConditionalGeneration",
        0.0,
    ),
}


def build(name: str, **sizes: Any) -> Any:
    """Return a family's random model in float32, seeded, with activations of unit size.

    The weights of the output head are larger, so that next-token distributions are not flat. `sizes` replace those of
    the family's text part, for a smaller vocabulary or fewer layers.
    """
    import transformers

    family = FAMILIES[name]
    config = family.build_config(**sizes)
    torch.manual_seed(0)
    model: Any = (
        getattr(transformers, family.model)(config)
        if family.model
        else transformers.AutoModelForCausalLM.from_config(config)
    )
    head = model.get_output_embeddings()
    tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    with torch.no_grad():
        for full, weight in model.named_parameters():
            _fill(full, weight, family, is_head=head is not None and weight is head.weight and not tied)
    return model


def _fill(name: str, weight: torch.nn.Parameter, family: Family, is_head: bool) -> None:
    leaf = name.rpartition(".")[2]
    if weight.dim() >= 2 and "conv" not in name:
        # Experts of gpt-oss are stored with their inputs first.
        inputs = weight.shape[-2] if weight.dim() == 3 and family.config == "GptOssConfig" else weight.shape[-1]
        weight.normal_(0, (3.0 if is_head else 1.0) / math.sqrt(inputs))
    elif "bias" in leaf and "correction" not in name:
        weight.normal_(0, 0.1)
    elif "norm" in name and leaf == "weight":
        # A norm with initial weights 0 applies 1 + w, a norm with initial weights 1 applies w. Some models have both.
        begins_at_one = bool(weight.float().mean() > 0.5)
        weight.copy_((1.0 if begins_at_one and family.norm else 0.0) + 0.1 * torch.randn_like(weight))


def make(name: str, folder: Path, tokenizer: Path, **sizes: Any) -> Path:
    """Write a family's random model (bfloat16) and the tokenizer of the folder `tokenizer` as a Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    build(name, **sizes).to(torch.bfloat16).save_pretrained(folder)
    for file in (*tokenizer.glob("token*"), *tokenizer.glob("*.jinja"), *tokenizer.glob("generation_config.json")):
        shutil.copy(file, folder)
    return folder
