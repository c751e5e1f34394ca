"""The memory estimate against the kernel's count: actor and rollout, two models, each with its own batch.

`--all-memory` runs each model with each batch, which takes four minutes more.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.cluster.process_environment import allocator
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight import memory_plan as memory
from verl_aqn.preflight.prepare import tell_workers
from verl_aqn.preflight.shape import Shape
from verl_aqn.preflight.sizing import shape_of
from verl_aqn.tasks.smollm2 import tiny_model

# Layers of 512 features: 71 and 92 M parameters, of which the embeddings and the head are 50.
LAYERS = (8, 16)
# Responses weigh most in one, prompts in the other.
ACTOR = {
    "short prompts": ["data.train_batch_size=6", "actor_rollout_ref.actor.ppo_mini_batch_size=6"],
    "long prompts": ["data.max_prompt_length=256", "data.max_response_length=8"],
    # The MLPs of 16 layers would save 1.1 GB, so they are computed again.
    "long responses": [
        "data.max_response_length=512",
        "data.train_batch_size=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.max_model_len=640",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
    ],
}
ROLLOUT = {
    "16 sequences": ["actor_rollout_ref.rollout.max_num_seqs=16"],
    "128 sequences": ["actor_rollout_ref.rollout.max_num_seqs=128"],
}
CACHE = 1 << 30


def pytest_generate_tests(metafunc):
    batches = list(ACTOR if metafunc.function is test_a_rank_of_the_actor else ROLLOUT)
    each = list(itertools.product(LAYERS, batches))
    few = list(zip((*LAYERS, LAYERS[-1]), batches, strict=False))
    cases = each if metafunc.config.getoption("--all-memory") else few
    metafunc.parametrize(("layers", "batch"), cases, indirect=["layers"])


@pytest.fixture(scope="module")
def layers(request, tmp_path_factory) -> Path:
    """Return the folder of a packed model with this many layers."""
    root = tmp_path_factory.mktemp(f"layers{request.param}")
    quantize_checkpoint(tiny_model(root / "tiny", layers=request.param, hidden=512), root / "packed")
    return root / "packed"


def recipe(packed: Path, overrides: list[str]) -> tuple[DictConfig, Shape]:
    path = f"actor_rollout_ref.model.path={packed}"
    config = load_recipe("e12_aggressive_1ep", ["profile=cpu", path, *overrides])
    tell_workers(config)
    return config, shape_of(packed, ("lm_head", "embed_tokens"))


def peaks(kind: str, config: DictConfig, folder: Path) -> dict[str, int]:
    """Return VmHWM in bytes after each phase of `python -m tests.memory.KIND`."""
    file = folder / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config, resolve=True))
    env = {**os.environ, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env |= allocator()
    with tempfile.TemporaryDirectory(prefix="aqn-") as sockets:  # short: a socket's path ends at 107 characters
        done = subprocess.run(
            [sys.executable, "-m", f"tests.memory.{kind}", str(file)], capture_output=True, text=True, check=False,
            timeout=850, env=env | {"TMPDIR": sockets},
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def check(estimate: memory.Estimate, peak: int) -> None:
    """Check that the estimate is within 15 % of the peak, and within 25 % above the constant of a bare process."""
    assert estimate.total == pytest.approx(peak, rel=0.15), estimate.parts
    bare = estimate.resident["process"]
    assert estimate.total - bare == pytest.approx(peak - bare, rel=0.25), estimate.parts


def test_a_rank_of_the_actor(layers, tmp_path, batch):
    config, shape = recipe(layers, ACTOR[batch])
    found = peaks("actor", config, tmp_path)
    sizes = memory.sizes(config)
    check(memory.actor(shape, sizes, memory.cpu_costs()), found["update"])
    update = memory.micro_batch(sizes, sizes.mini_batch, sizes.update_tokens)
    assert memory.recomputes(shape, sizes, update) == (batch == "long responses" and shape.layers == LAYERS[-1])


def test_a_rank_of_the_rollout(layers, tmp_path, batch):
    config, shape = recipe(layers, ROLLOUT[batch])
    found = peaks("rollout", config, tmp_path)
    check(memory.rollout(shape, memory.sizes(config), memory.cpu_costs(), CACHE), found["answered"])
