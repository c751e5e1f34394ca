"""A merged model in 4 bits, served by vLLM: the command, its proof, and an engine that holds the new codes."""

import json

from tests.helpers.command import run
from tests.helpers.export_runs import exported_run, packed_base, state_of, trained, write_training_data
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed


def test_a_model_rounded_to_4_bits_again_is_served_as_the_trainer_computes_it(tmp_path):
    base = packed_base(tmp_path / "base")
    of_run = exported_run(tmp_path / "experiment", base, state_of(trained(base)), problems=12)
    write_training_data(of_run)
    done = run("export", of_run, tmp_path / "out", "--merge", "--format", "mxfp4", "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert is_packed(tmp_path / "out")
    assert checkpoint_digest(tmp_path / "out") != proof["base"]["digest"] == checkpoint_digest(base)
    effect, survived = proof["answers"]["effect"], proof["answers"]["survived"]
    assert proof["proved"]
    assert effect["error"] < effect["allowed"]
    assert survived["error"] < 0.6 < survived["shown"]
