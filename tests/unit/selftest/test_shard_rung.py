"""The rung of FSDP2 passes on two gloo ranks, and fails for each fault of sharding."""

import pytest

from verl_aqn.selftest import shard_rung
from verl_aqn.selftest.child import answer
from verl_aqn.selftest.rung import FAILED, PASSED, Context


def climbed(tmp_path) -> dict:
    return answer("shard_rung.check", Context("cpu", 1, tmp_path))


def test_two_ranks_hold_the_packed_base(tmp_path):
    said = climbed(tmp_path)
    assert (said["status"], said["why"]) == (PASSED, "")
    assert said["figures"]["ranks"] == 2


@pytest.mark.parametrize(
    "fault",
    ["not sharded", "a bit of a shard", "gradients of one rank", "another output", "a rank that dies"],
)
def test_a_broken_shard_fails(monkeypatch, tmp_path, fault):
    monkeypatch.setenv("SELFTEST_FAULT", fault)
    monkeypatch.setattr(shard_rung, "RANK_MODULE", "tests.helpers.selftest_broken_rank")
    said = climbed(tmp_path)
    assert said["status"] == FAILED
    assert "rank" in said["why"]
