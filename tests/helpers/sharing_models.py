"""Tiny models of all kinds of attention: those that can share a prompt between samples, and those that cannot."""

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

V, WINDOW = 96, 6
BASE = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GQA = BASE | {"num_key_value_heads": 2}
SMALL = GQA | {"head_dim": 8}
WINDOWED = SMALL | {"sliding_window": WINDOW}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MLA = BASE | MOE | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
SHARING = {
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", WINDOWED),
    "ministral": ("Ministral", WINDOWED),
    "qwen2": ("Qwen2", GQA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", SMALL),
    "qwen3_moe": ("Qwen3Moe", SMALL | MOE | {"num_experts": 4}),
    "gemma2": ("Gemma2", WINDOWED | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", WINDOWED | MIXED | {"query_pre_attn_scalar": 8}),
    "gemma4": (
        "Gemma4Text",
        WINDOWED | MIXED | {
            "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": V,
            "num_kv_shared_layers": 1, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", GQA | {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", GQA),
    "olmo3": ("Olmo3", GQA | MIXED | {"sliding_window": WINDOW}),
    "granite": ("Granite", GQA),
    "glm4": ("Glm4", SMALL),
    "glm4_moe": (
        "Glm4Moe",
        SMALL | MOE | {
            "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        },
    ),
    "gpt_oss": ("GptOss", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", MLA | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", MLA),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", GQA),
    "cohere": ("Cohere", GQA),
    "cohere2": ("Cohere2", WINDOWED | MIXED),
    "starcoder2": ("Starcoder2", GQA | {"sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", BASE),
    "exaone4": ("Exaone4", SMALL | MIXED | {"sliding_window": WINDOW}),
    "llama4 chunks": (
        "Llama4Text",
        SMALL | {
            "attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1, "attn_temperature_tuning": False, "intermediate_size_mlp": 48,
        },
    ),
}  # fmt: skip
SEPARATED = {
    "qwen3_next": ("Qwen3Next", SMALL | LINEAR | {"num_experts": 0}, "model.layers.0.linear_attn"),
    "qwen3_5": ("Qwen3_5Text", SMALL | LINEAR, "model.layers.0.linear_attn"),
    "lfm2": ("Lfm2", GQA | {"layer_types": ["conv", "full_attention"]}, "model.layers.0.conv"),
    "granite hybrid": (
        "GraniteMoeHybrid",
        GQA
        | MAMBA
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
        },
        "model.layers.0.mamba",
    ),
    "falcon_h1": ("FalconH1", SMALL | MAMBA | {"mamba_d_ssm": 64}, "model.layers.0.mamba"),
    "nemotron_h": (
        "NemotronH",
        SMALL
        | {
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
        "model.layers.0.mixer",
    ),
    "minimax": (
        "MiniMax",
        SMALL
        | {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
        "model.layers.0.self_attn",
    ),
    "bamba": ("Bamba", GQA | MAMBA | {"attn_layer_indices": [1]}, "model.layers.0.mamba"),
    "jamba": (
        "Jamba",
        GQA
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        "model.layers.0.mamba",
    ),
    "llama4 by slot": (
        "Llama4Text",
        SMALL
        | {
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 48,
        },
        "counts the tokens of a row",
    ),
    "bloom": (
        "Bloom",
        {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "does not use transformers' attention interface",
    ),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 1,
        },
        "no layer of Mamba2ForCausalLM",
    ),
}


def make(kind: str, **more) -> transformers.PreTrainedModel:
    config, arguments, *_ = (SHARING | SEPARATED)[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        getattr(transformers, config + "Config")(**(arguments | more)), dtype=torch.float32
    )
    for name, p in model.named_parameters():  # large enough for attention to matter, small enough to be smooth
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
        elif "sinks" in name:
            nn.init.normal_(p)
    return model.eval()
