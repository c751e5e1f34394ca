"""Sizes of known models, for measurements on random weights."""

import json
from pathlib import Path

_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Layers, hidden, inner, heads, key-value heads, vocabulary; from the models' published config.json.
SHAPES = {
    "135M": (30, 576, 1536, 9, 3, 49_152),  # SmolLM2-135M
    "360M": (32, 960, 2560, 15, 5, 49_152),  # SmolLM2-360M
    "1B": (16, 2048, 8192, 32, 8, 128_256),  # Llama-3.2-1B
    "1.5B": (28, 1536, 8960, 12, 2, 151_936),  # Qwen2.5-1.5B
    "7B": (28, 3584, 18_944, 28, 4, 152_064),  # Qwen2.5-7B
    "8B": (32, 4096, 14_336, 32, 8, 128_256),  # Llama-3.1-8B
    "14B": (48, 5120, 13_824, 40, 8, 152_064),  # Qwen2.5-14B
    "32B": (64, 5120, 27_648, 40, 8, 152_064),  # Qwen2.5-32B
    "70B": (80, 8192, 28_672, 64, 8, 128_256),  # Llama-3.1-70B
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_config(name: str, folder: Path, family: str = "llama") -> Path:
    """Write a folder that contains only a config.json of this shape, of one of the families in `CLASSES`."""
    *shape, vocabulary = SHAPES[name]
    config = dict(zip(_KEYS, shape, strict=True))
    config |= {"vocab_size": vocabulary, "tie_word_embeddings": config["hidden_size"] < 3000}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family, "architectures": [CLASSES[family]]} | config))
    return folder


def write_model(name: str, folder: Path) -> Path:
    """Random weights of this shape, but with SmolLM2's tokenizer and its 49,152 tokens, and a head of its own."""
    from verl_aqn.tasks.smollm2 import random_model

    layers, hidden, inner, heads, key_value_heads, _ = SHAPES[name]
    return random_model(folder, layers, hidden, inner=inner, heads=heads, key_value_heads=key_value_heads)
