"""Sizes of random models that a test builds in milliseconds. Every K is a multiple of 32, one MXFP4 block."""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL_MOE = SMALL | {"num_experts_per_tok": 2}
SMALL_ASCEND = SMALL | {"intermediate_size": 128}  # vllm-ascend takes scales in pairs: K is a multiple of 64


TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
