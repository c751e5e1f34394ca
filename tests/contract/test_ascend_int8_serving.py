"""An int8 folder in a model of vLLM with vllm-ascend's own scheme W8A16: loaded, computed with, and read back.

The scheme and the class around it run from the source of the pinned wheel, with a stand-in for torch_npu's operator
(tests/helpers/ascend_int8_model.py). Nothing of it was run on an NPU.
"""

import copy
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.ascend_packages import read
from tests.helpers.base_answers import actor_of, loaded
from tests.helpers.rounded_block import pack_with_a_rounded_block
from verl_aqn.checkpoints.int8_base import write_int8
from verl_aqn.checkpoints.packing import checkpoint_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.base_evidence import BaseRecords
from verl_aqn.runs.judge.base_record import check_base, sentence

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The packed folder, and vLLM's reply about the int8 folder that was made of it. One block is rounded."""
    read("vllm_ascend/quantization/methods/w8a16.py")  # skips without the wheels
    root = tmp_path_factory.mktemp("int8")
    changes = write_int8(pack_with_a_rounded_block(root), root / "int8")
    assert sum(change.changed for change in changes.values()) == 1
    env = os.environ | {"VERL_PLATFORM": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.helpers.ascend_int8_model", str(root / "int8"), str(root / "packed")]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    said = [json.loads(line.removeprefix("RESULT ")) for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(said) == 1, ran.stderr[-3000:]
    return root / "packed", said[0]


def test_it_is_read_back_and_judged(served):
    packed, said = served
    made = BaseRecords(packed, "int8", "none", lambda text: None)
    actor = [actor_of(loaded(packed), packed)]
    found = [made.record(when, actor, [said["clean"]], {"actor": 1, "rollout": 1}) for when in ("start", "end")]
    start, end = json.loads(json.dumps(found))
    check_base(start, None)
    check_base(end, start)
    (rollout,) = start["rollout"]
    assert (rollout["form"], rollout["kernel"], rollout["activations"]) == ("int8", "AscendW8A16LinearMethod", ["none"])
    assert rollout["weights_equal_base"] is True
    assert rollout["base_digest"] == start["served"] == checkpoint_digest(packed, form="int8") != start["disk"]
    assert start["holders"]["rollout 0"]["packed"]["live"] == start["expected"]["packed"]
    assert start["int8"]["changed"] == 1
    assert f"; 1 of {start['int8']['blocks']:,} blocks" in sentence(start)
    assert sentence(start).endswith("% in a matrix (model.layers.0.mlp.up_proj)")
    for name in ("packed", "bf16"):  # another form than the recipe asked for
        other = BaseRecords(packed, name, "none", lambda text: None)
        record = other.record("start", actor, [said["clean"]], {"actor": 1, "rollout": 1})
        with pytest.raises(EvidenceError, match=f"holds its base as int8, expected .*={name}"):
            check_base(record, None)


def test_the_layers_multiply_with_the_values_of_the_base(served):
    """The rounded block and bfloat16 outputs are all that differs."""
    assert served[1]["products"] < 0.005


def test_what_changes_after_loading_is_found(served):
    """Also one offset of 2^-20, which rounding would hide, and a weight in another layout."""
    assert served[1]["now"] == {
        "weight": False,
        "weight_scale": False,
        "weight_offset": False,
        "layout": False,
        "again": True,
    }


def test_a_layer_of_another_class_is_refused(served):
    """A kernel whose rounding of activations is not known cannot pass as W8A16."""
    packed, said = served
    wrong = copy.deepcopy(said["clean"]) | {"activations": ["unknown"], "kernel": "AscendW8A8DynamicLinearMethod"}
    made = BaseRecords(packed, "int8", "none", lambda text: None)
    record = made.record("start", [actor_of(loaded(packed), packed)], [wrong], {"actor": 1, "rollout": 1})
    with pytest.raises(EvidenceError, match=r"AscendW8A8DynamicLinearMethod rounds activations as \['unknown'\]"):
        check_base(record, None)
