"""A tiny packed model of which int8 rounds exactly one block."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints.packing import quantize_checkpoint


def pack_with_a_rounded_block(root: Path) -> Path:
    """Write the model in bf16 and packed below `root`, and return the packed folder. The block is in an `up_proj`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_ASCEND), dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :32] *= 2.0**-4
    model.save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    return root / "packed"
