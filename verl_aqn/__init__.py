"""RL post-training of MXFP4 language models with LoRA and adaptive quantization noise, on stock verl."""

__version__ = "0.1.0"
