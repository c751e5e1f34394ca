"""Every tensor of a base in vLLM's models is compared with the folder, and one changed value of each kind is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.base_answers import actor_of, loaded
from verl_aqn.bench.families import build
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.base_evidence import BaseRecords
from verl_aqn.runs.judge.base_record import check_base, sentence

pytest.importorskip("vllm")
# Which folder is loaded: the packed one, its bf16 equivalent, or an unquantised base.
CASES = {
    "qwen2": ("packed", "dense", "source"),  # biases; a tied head
    "llama3": ("packed",),  # a head
    "gpt_neox": ("dense",),  # q, k and v in one tensor, LayerNorms
    "mixtral": ("dense", "source"),  # experts, routers
    "qwen3_moe": ("dense",),
    "falcon_h1": ("source",),  # Mamba: A_log
    "gemma3": ("packed",),  # norms around 0
}
REARRANGED = ("packed", "matrices", "routers")
GROUPS = {
    ("qwen2", "packed"): {"norms", "biases", "embeddings"},
    ("llama3", "packed"): {"norms", "embeddings", "head"},
    ("gpt_neox", "dense"): {"norms", "biases", "embeddings", "head"},
    ("mixtral", "source"): {"norms", "routers", "embeddings", "head"},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, dict]]:
    """By family and kind: the folder that the actor loads, and vLLM's report about the folder that it loads."""
    root = tmp_path_factory.mktemp("families")
    cases = [(family, kind) for family, kinds in CASES.items() for kind in kinds]
    for family in CASES:
        build(family, vocab_size=512).to(torch.bfloat16).save_pretrained(root / family / "source")
        quantize_checkpoint(root / family / "source", root / family / "packed")
        dequantize_checkpoint(root / family / "packed", root / family / "dense")
    folders = [str(root / family / kind) for family, kind in cases]
    env = os.environ | {"VERL_PLATFORM": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.helpers.vllm_models", *folders],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    said = [json.loads(line.removeprefix("RESULT ")) for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(said) == len(cases), ran.stderr[-3000:]
    actor = {kind: "source" if kind == "source" else "packed" for kind in ("packed", "dense", "source")}
    return {(f, k): (root / f / actor[k], one) for (f, k), one in zip(cases, said, strict=True)}


@pytest.mark.parametrize("case", [(family, kind) for family, kinds in CASES.items() for kind in kinds], ids=str)
def test_all_is_compared_and_one_value_of_each_kind_is_caught(answers, case):
    folder, said = answers[case]
    made = BaseRecords(folder, "bf16" if case[1] == "dense" else "packed", "none", lambda text: None)
    actor = [actor_of(loaded(folder), folder)]

    def record(answer: dict, when: str = "start") -> dict:
        return made.record(when, actor, [answer], {"actor": 1, "rollout": 1})

    clean = record(said["clean"])
    check_base(clean, None)
    json.dumps(clean)
    left = [(one["group"], one["code"]) for one in clean["not_compared"]]
    assert left == ([("other", "computed")] if case[0] == "falcon_h1" else [])
    holders = clean["holders"]["rollout 0"]
    # CPU kernels rearrange the weights of linear layers, including routers.
    assert all(one["live"] == one["tensors"] for group, one in holders.items() if group not in REARRANGED)
    groups = {made.disk.groups[name]: name for name in said["changed"]}
    assert groups.keys() >= GROUPS.get(case, {"norms"})
    for name, digest in said["changed"].items():
        tensors = said["clean"]["tensors"]
        answer = said["clean"] | {"tensors": tensors | {name: [digest, *tensors[name][1:]]}}
        if name in said["clean"]["computed"]:  # not compared with the folder, but with the start
            with pytest.raises(EvidenceError, match="at the end left of the base differs from the start"):
                check_base(record(answer, "end"), clean)
            continue
        with pytest.raises(EvidenceError, match=f"at the start: {name} in rollout 0 differs from the folder"):
            check_base(record(answer), None)
    check_base(record(said["clean"], "end"), clean)
    assert sentence(clean).startswith("base equal on disk, in the actor and in the rollout: ")
