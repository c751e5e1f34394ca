"""A decode step of the rollout on a CPU, beside the time of its matrix products alone, in one process.

Random weights, an adapter of rank 32 on every linear layer, and vLLM's engine in this process. The products alone are
`torch.nn.functional.linear` with bf16 weights of the same shapes for as many tokens, without adapters: what a decode
step would take if nothing else cost time. Each layer has its own weight, as in the model, so that caches do not help.
"""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from verl_aqn.bench.codec_speed import device_name
from verl_aqn.bench.shapes import SHAPES, write_model
from verl_aqn.bench.update_speed import timed
from verl_aqn.integrations.verl.engine_probe import EngineProbe

ARMS = ("packed", "bf16")
PROMPT, RANK = 60, 32
VOCABULARY = 49_152  # of `write_model`


def measure(
    shape: str, sequences: list[int], tokens: int, rounds: int, on_part: Callable[[int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Return the seconds of decode steps with a packed and with a bf16 base, and of the products alone.

    Args:
        shape: a name in `SHAPES`.
        sequences: numbers of sequences that are decoded at once.
        tokens: decode steps of each round.
        rounds: rounds of each arm, in turn with the products alone.
        on_part: called with the number of finished and of all parts.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine computes in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parts, done = len(ARMS) * len(sequences) * rounds, 0
    rows: dict[int, dict[str, Any]] = {n: {"products": []} for n in sequences}
    products = {n: _products(shape, n) for n in sequences}
    with TemporaryDirectory(prefix="verl-aqn-bench-") as folder:
        folders = _write(shape, Path(folder))
        for arm in ARMS:
            engine = EngineProbe(str(folders[arm]), _options(max(sequences), PROMPT + tokens + 4))
            engine.decode_seconds(max(sequences), PROMPT, 8, folders["adapter"])  # warms up
            for n in sequences:
                rows[n][arm] = []
                for _ in range(rounds):
                    rows[n][arm] += engine.decode_seconds(n, PROMPT, tokens, folders["adapter"])
                    rows[n]["products"] += [timed(products[n], "cpu")[0] for _ in range(tokens // 4)]
                    done += 1
                    on_part(done, parts)
            del engine
    return {
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "shape": shape,
        "tokens": tokens,
        "rows": [{"sequences": n, **{name: _figures(times) for name, times in rows[n].items()}} for n in sequences],
    }


def _options(sequences: int, length: int) -> dict[str, Any]:
    """Return arguments of `vllm.LLM` as for a run: norms are in float32, so that they can carry noise."""
    return {
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": length,
        "max_num_seqs": sequences,
        "gpu_memory_utilization": 0.1,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": RANK,
        "enable_prefix_caching": False,
        "worker_extension_cls": "verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension",
    }


def _write(shape: str, folder: Path) -> dict[str, Path]:
    """Write the model, its packed form and an adapter; return their folders."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from verl_aqn.checkpoints.packing import quantize_checkpoint

    folders = {"bf16": write_model(shape, folder / "bf16"), "packed": folder / "packed", "adapter": folder / "adapter"}
    quantize_checkpoint(folders["bf16"], folders["packed"])
    model = AutoModelForCausalLM.from_pretrained(folders["bf16"], dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folders["adapter"])
    return folders


def _products(shape: str, tokens: int) -> Callable[[], None]:
    """Return a function that computes all matrix products of a decode step, each layer fused as vLLM fuses it."""
    layers, hidden, inner, heads, key_value, _ = SHAPES[shape]
    kv = hidden // heads * key_value
    sizes = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    weights = [torch.randn(size).bfloat16() for _ in range(layers) for size in sizes]
    weights.append(torch.randn(VOCABULARY, hidden).bfloat16())
    inputs: dict[int, Tensor] = {k: torch.randn(tokens, k).bfloat16() for k in (hidden, inner)}

    @torch.inference_mode()
    def compute() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return compute


def _figures(times: list[float]) -> dict[str, float]:
    low, _, high = quantiles(times, n=4)
    return {"median": median(times), "quarter": low, "three_quarters": high}


def table(result: dict[str, Any]) -> Table:
    """Return a table with one row per number of sequences."""
    view = Table(
        title=f"Decode step of {result['shape']} with an adapter of rank {RANK}, {result['device']}, "
        f"{result['threads']} threads; medians, with the middle half",
        title_justify="left",
    )
    heads = ("sequences", "packed, ms", "bf16, ms", "products alone, ms", "packed / products", "packed / bf16")
    for head in heads:
        view.add_column(head, justify="right")
    for row in result["rows"]:
        times = [
            f"{1e3 * one['median']:.1f} ({1e3 * one['quarter']:.1f} to {1e3 * one['three_quarters']:.1f})"
            for one in (row["packed"], row["bf16"], row["products"])
        ]
        packed, bf16, products = (row[name]["median"] for name in ("packed", "bf16", "products"))
        view.add_row(str(row["sequences"]), *times, f"{packed / products:.2f}", f"{packed / bf16:.2f}")
    return view
