"""What the limits of int8 mean for the embedded model: the figures of docs/devices.md, computed again in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_aqn.cache import cache_dir
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.int8_change import LIMIT_BASE, Change
from verl_aqn.mxfp4.int8_rows import to_int8
from verl_aqn.tasks.smollm2 import embedded_model

LICENSE = Path(__file__).parents[2] / "LICENSE"
TOKENS = 1024


def test_the_limits_beside_arithmetic_in_bfloat16():
    """Mean |Δ log-prob| in nats a token against the packed base, on the first 1,024 tokens of the file LICENSE."""
    folder = embedded_model(cache_dir() / "models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(LICENSE.read_text(), return_tensors="pt").input_ids[:, :TOKENS]
    weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    codes = {name: quantize(weight.detach().bfloat16(), "mse") for name, weight in weights.items()}
    packed = {name: dequantize(*of, torch.float32) for name, of in codes.items()}
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def log_probs(values: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        for name, weight in weights.items():
            weight.data = values[name].to(dtype)
        logits = model.to(dtype)(tokens).logits.float()[0, :-1].log_softmax(-1)
        return logits.gather(-1, tokens[0, 1:, None])

    def moved(values: torch.Tensor, error: float) -> torch.Tensor:
        """Change each block by `error` times its norm, in a random direction."""
        blocks = values.unflatten(1, (-1, 32))
        noise = torch.nn.functional.normalize(torch.randn(blocks.shape, generator=generator), dim=-1)
        return (blocks + error * blocks.norm(dim=-1, keepdim=True) * noise).flatten(1)

    base = log_probs(packed)
    made = {name: to_int8(*of) for name, of in codes.items()}
    found = {"int8": log_probs({name: rows.values() for name, (rows, _) in made.items()})}
    for error in (LIMIT_BASE, 0.02):
        found[error] = log_probs({name: moved(values, error) for name, values in packed.items()})
    found["bfloat16"] = log_probs(packed, torch.bfloat16)
    figures = {name: (other - base).abs().mean().item() for name, other in found.items()}
    assert sum((change for _, change in made.values()), Change()).error == pytest.approx(0.0017, abs=5e-5)
    assert figures == pytest.approx({"int8": 0.009, LIMIT_BASE: 0.053, 0.02: 0.19, "bfloat16": 0.050}, rel=0.1)
