"""Folders on disk: bounded memory, shards, damage that is reported by name, and writers that are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.checkpoints.storage import Spec, Weights
from verl_aqn.checkpoints.writing import new_folder, write_model
from verl_aqn.errors import ModelError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_shards(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "one")
    quantize_checkpoint(source, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    one = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == one.keys()
    for file in files:
        shard = load_file(tmp_path / "many" / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 20_000 or len(shard) == 1
        for name, tensor in shard.items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, one[name])
    assert checkpoint_digest(tmp_path / "one") == checkpoint_digest(tmp_path / "many")
    load_model(tmp_path / "many")
    dequantize_checkpoint(tmp_path / "many", tmp_path / "dense", max_shard_bytes=40_000)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(dense.model.norm.weight, one["model.norm.weight"])


def test_reads_what_safetensors_reads(source: Path) -> None:
    weights, theirs = Weights(source), load_file(source / "model.safetensors")
    assert weights.specs.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(weights.read(name), tensor)
        assert torch.equal(weights.read(name, len(tensor) - 1), tensor[-1])


def test_a_file_that_shrinks_while_it_is_read(source: Path) -> None:
    weights = Weights(source)
    os.truncate(source / "model.safetensors", 10_000)
    name = max(weights.specs, key=lambda name: weights._place[name][1])
    with pytest.raises(ModelError, match=f"cannot read tensor {name} of .*model.safetensors .*the file became shorter"):
        weights.read(name)


def test_every_dtype_survives(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(3, 5).double(),
        "c": torch.randn(7).half(),
        "d": torch.arange(3),
        "e": torch.empty(0, 4),
        "f": torch.tensor(2.5),
    }
    layout = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (tmp_path / "source").mkdir()
    with new_folder(tmp_path / "out") as folder:
        write_model(folder, {}, layout, reversed(tensors.items()), tmp_path / "source", {})
    theirs, weights = load_file(tmp_path / "out/model.safetensors"), Weights(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(weights.read(name), tensor)


WRITER = """
import sys, time
from verl_aqn.checkpoints.packing import quantize_checkpoint

def stop(done, total, module):
    if done == 5:
        print("half way", flush=True)
        time.sleep(120)

quantize_checkpoint(sys.argv[1], sys.argv[2], progress=stop)
"""


def test_killed_writers_leave_nothing_that_the_next_does_not_remove(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "packed"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, source, target], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "half way\n"
        (half,) = target.parent.iterdir()
        assert half.name.startswith(".packed.")
        # The folder of a living writer is not touched; the faster writer gets the name.
        quantize_checkpoint(source, target)
        assert half.is_dir()
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert sorted(target.parent.iterdir()) == [half, target]
    digest = checkpoint_digest(target)
    target.rename(tmp_path / "moved")
    other = target.parent / ".packed.note.tmp"
    other.mkdir()  # not a writer's folder, because it never had a lock
    quantize_checkpoint(source, target)
    assert checkpoint_digest(target) == digest
    assert sorted(target.parent.iterdir()) == [other, target]
    assert not (target / ".lock").exists()


MEASURED = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from verl_aqn.checkpoints.packing import quantize_checkpoint

def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

def growth(function):
    before = peak(reset=True)
    function()
    return peak() - before

small, large, out = sys.argv[1:]
torch.set_num_threads(1)
quantize_checkpoint(small, out + "/small")  # imports, buffers, thread pools
print(growth(lambda: quantize_checkpoint(large, out + "/large")))
print(growth(lambda: [tensor + 0 for tensor in load_file(large + "/model.safetensors").values()]))
"""


def test_memory_is_bounded_by_a_matrix_and_not_by_the_model(tmp_path: Path) -> None:
    """The MoE has 76 MB, fused stacks of 25 MB, and matrices of at most 0.5 MB."""
    from transformers import Qwen3MoeConfig

    for name, experts in (("small", 2), ("large", 48)):
        config = Qwen3MoeConfig(
            **SMALL | {"hidden_size": 512, "intermediate_size": 512},
            moe_intermediate_size=256,
            num_experts=experts,
            num_experts_per_tok=2,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        layout = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
        config.architectures = ["Qwen3MoeForCausalLM"]
        row = torch.randn(1 << 16).bfloat16()
        with new_folder(tmp_path / name) as folder:
            tensors = (
                (
                    key,
                    row.repeat(-(-torch.Size(s.shape).numel() // len(row)))[: torch.Size(s.shape).numel()].view(
                        s.shape
                    ),
                )
                for key, s in layout.items()
            )
            write_model(folder, json.loads(config.to_json_string()), layout, tensors, tmp_path, {})
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert size > 70e6
    arguments = [tmp_path / "small", tmp_path / "large", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    streamed, whole = map(int, result.stdout.split())
    assert whole > size, "the measurement does not see memory"
    assert streamed < 16e6
