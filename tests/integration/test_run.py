"""A real run through verl, Ray and vLLM on a tiny random model, and what it must prove."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow.json
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration import sockets
from tests.integration.conftest import (
    TINY,
    ask_vllm,
    compared,
    descendants,
    finish,
    kill,
    leftovers,
    lines,
    lines_of,
    newest,
    verl_aqn,
)
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.evaluation.export.export_engine import ask_vllm as ask_engine
from verl_aqn.launch.forkserver import worker
from verl_aqn.preflight import memory_plan as memory
from verl_aqn.preflight.memory_plan import sizes
from verl_aqn.preflight.sizing import shape_of
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.agreement import agreement

PLANTED = "planted-cc97d"
# The socket of verl's actor and rollout in any run that starts its own Ray.
VERLS_SOCKET = Path("/tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock")
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD")


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory) -> Path:
    """Folder of a finished run of three steps."""
    base = tmp_path_factory.mktemp("finished")
    before = leftovers()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as watcher:
        for name in SECRETS:
            patch.setenv(name, PLANTED)
        (home := tmp_path_factory.mktemp("home") / "home").mkdir()
        patch.setenv("HOME", str(home))
        with VERLS_SOCKET.open("x") as socket:
            socket.write("another run's")
        process = train(base, "aqn.noise.probe=true", new=True)
        listening = watcher.submit(sockets.watch, process, base / "listening.jsonl")
        out, err = process.communicate(timeout=800)
        listening.result()
        kept = VERLS_SOCKET.read_text() if VERLS_SOCKET.exists() else "removed"
        VERLS_SOCKET.unlink(missing_ok=True)
    assert process.returncode == 0, err + (newest(base) / "training.log").read_text()[-3000:]
    (newest(base) / "socket.txt").write_text(kept)
    (newest(base) / "stdout.txt").write_text(out)
    (newest(base) / "stderr.txt").write_text(err)
    (base / "listening.jsonl").rename(newest(base) / "listening.jsonl")
    (newest(base) / "leftovers.txt").write_text("\n".join(leftovers() - before))
    (newest(base) / "home.txt").write_text("\n".join(str(path) for path in home.rglob("*")))
    return newest(base)


def test_a_line_a_step_then_tables_and_verdict(finished):
    out, err = (finished / "stdout.txt").read_text(), (finished / "stderr.txt").read_text()
    assert [f"step {n}/3" in err for n in (1, 2, 3)] == [True, True, True]
    assert "Noise by stage" in out
    assert "Accuracy (noise off)" in out
    assert "not comparable" in out.replace("\n", " ")
    assert "WARNING" not in err
    assert "vllm" not in err.lower()


def test_the_socket_of_another_run_on_the_machine_is_left_alone(finished):
    assert (finished / "socket.txt").read_text() == "another run's"


def test_the_start_was_measured_before_ray(finished):
    (record,) = lines(finished / "evidence.jsonl", "strength")
    assert record["noisy"]["sigma"] == 0.05
    assert record["noisy"]["kl"][0] > record["clean"]["kl"][0] == 0
    err = (finished / "stderr.txt").read_text()
    assert 0 < err.index("strength σ 0.05: KL") < err.index("starting Ray")


def test_base_is_one_and_the_same_and_unchanged_at_the_end(finished):
    start, end = lines(finished / "evidence.jsonl", "base")
    assert (start["when"], end["when"]) == ("start", "end")
    for record in (start, end):
        assert record["rollout"][0]["layers"] == 4 * 2  # qkv, o, gate_up, down in each of two layers
        assert record["rollout"][0]["weights_equal_base"]
        assert {record["disk"], *record["actor"], record["rollout"][0]["base_digest"]} == {start["disk"]}


def test_every_frozen_tensor_was_compared_and_the_console_says_which(finished):
    said, start = compared(finished)
    assert said == (
        "base equal on disk, in the actor and in the rollout: 14 packed matrices, 5 norms, 1 embedding, 1 head"
    )
    assert said in (finished / "stderr.txt").read_text()
    norms = start["holders"]["rollout 0"]["norms"]
    assert (norms["tensors"], norms["live"]) == (5, 5)


def test_adapter_changes_at_every_step_and_reaches_the_rollout(finished):
    records = lines(finished / "evidence.jsonl", "adapter")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(record["actual"][0]["adapter_digest"] == record["sent"] for record in records)
    assert all(record["actual"][0]["modules"] == 14 for record in records)
    assert len({record["sent"] for record in records}) == 4
    assert records[0]["actual"][0]["b_max"] == 0.0
    assert records[-1]["actual"][0]["b_max"] > 0.0


def test_noise_is_what_the_schedule_says_at_every_step(finished):
    records = lines(finished / "evidence.jsonl", "noise")
    assert [record["sigma_target"] for record in records] == [0.0, 0.05, 1e-5]
    for record in records:
        assert record["modules"] == 5  # two in each of two layers, and the last
        low, high = record["sigma_interval"]
        assert low <= record["sigma_measured"] <= high or record["sigma_target"] == 0


def test_validation_is_clean_to_the_last_bit(finished):
    clean = lines(finished / "evidence.jsonl", "clean")
    norms = lines(finished / "evidence.jsonl", "rollout")[0]
    assert len(clean) >= 2
    assert all(record["weights_digest"] == norms["clean_digest"] for record in clean)


def test_last_step_is_validated_although_test_freq_does_not_divide_it(finished):
    assert [record["step"] for record in lines(finished / "metrics.jsonl", "validation")] == [0, 3]


def test_the_record_is_whole_and_readable_by_others(finished):
    """The record says what was run, with which inputs, and with which result."""
    state, versions = (json.loads((finished / f"{name}.json").read_text()) for name in ("state", "versions"))
    assert (state["status"], state["attempt"]) == ("finished", 1)
    assert {"commit", "dirty", "device", "python", "torch", "verl", "vllm", "math-verify"} <= versions.keys()
    assert set(versions["data"]) == {"train.parquet", "test.parquet"}
    assert all(len(digest) == 64 for digest in versions["data"].values())
    config = (finished / "config.yaml").read_text()
    assert "${" not in config
    assert isinstance(yaml.safe_load(config)["aqn"]["seed"], int)
    assert len(lines(finished / "evidence.jsonl", "base")[0]["disk"]) == 64
    assert len(lines(finished / "metrics.jsonl", "step")) == 3
    for record in lines(finished / "metrics.jsonl", "validation"):
        items = pyarrow.json.read_json(finished / "validation" / f"{record['step']}.jsonl").to_pylist()
        assert len(items) == record["items"]
        assert {"input", "output", "gts", "acc", "flexible", "math_verify"} <= items[0].keys()
        for rule, column in (("accuracy", "acc"), ("math_verify", "math_verify")):
            assert record[rule] == pytest.approx(sum(item[column] for item in items) / len(items))
    for name in ("metrics", "evidence", "events"):
        assert pyarrow.json.read_json(finished / f"{name}.jsonl").num_rows == len(lines(finished / f"{name}.jsonl"))


def test_metrics_hold_sigma_target_and_measured(finished):
    steps = lines(finished / "metrics.jsonl", "step")
    assert [step["metrics"]["aqn/sigma"] for step in steps] == [0.0, 0.05, 1e-5]
    assert steps[1]["metrics"]["aqn/sigma_measured"] == pytest.approx(0.05, rel=0.2)
    assert all(step["metrics"]["actor/grad_norm"] > 0 for step in steps)


def test_every_rank_says_how_much_memory_it_took_and_the_estimate_is_near(finished):
    (record,) = lines(finished / "events.jsonl", "memory")
    config = OmegaConf.load(finished / "config.yaml")
    exclude = tuple(config.aqn.mxfp4.exclude)
    shape, given = shape_of(Path(config.actor_rollout_ref.model.path), exclude), sizes(config)
    (actor,), (rollout,), costs = record["actor"], record["rollout"], memory.cpu_costs()
    expected = memory.actor(shape, given, costs).total + memory.RAY_WORKER
    assert actor["resident"] == pytest.approx(expected, rel=0.25)
    assert rollout["resident"] == pytest.approx(memory.rollout(shape, given, costs, 1 << 30).total, rel=0.25)


def test_trainer_and_rollout_agree_where_there_is_no_noise(finished):
    """With the same base and adapter, the probabilities of the sampled tokens are equal up to bf16 rounding."""
    first = lines(finished / "metrics.jsonl", "step")[0]["metrics"]
    assert first["training/rollout_actor_probs_pearson_corr"] > 0.98


def test_plan_paths_point_to_the_run_and_a_second_run_would_not_overwrite_it(finished):
    base = finished.parent.parent
    assert (base / "training.log").resolve() == finished / "training.log"
    assert (base / "checkpoints" / "global_step_3").is_dir()
    assert (finished / "config.yaml").exists()


def test_nothing_is_left_running(finished):
    assert (finished / "leftovers.txt").read_text() == ""
    marker = str(finished)
    assert not [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


def test_nothing_but_caches_is_written_into_the_home_folder(finished):
    """The caches of datasets and vLLM, and not Ray's token, which others could read there."""
    written = (finished / "home.txt").read_text().splitlines()
    assert any("/home/.cache/vllm/" in path for path in written)  # else the run did not use this home folder
    assert [path for path in written if "/home/.cache" not in path] == []


def test_every_listening_socket_is_known_and_guarded(finished):
    """The table is in docs/security.md."""
    found = lines(finished / "listening.jsonl")
    of = {(one["kind"], one["process"], sockets.guard_of(one["kind"], one["process"])) for one in found}
    assert not [one for one in of if one[2] is None]
    told = {guard for *_, guard in of}
    assert told == {guard for *_, guard in sockets.guards()}, "the table tells of a socket that is not there"
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    (attempt,) = lines(finished / "events.jsonl", "temporary")
    for one in found:
        where = one["place"].startswith(f"{attempt['path']}/") if one["kind"] == "unix" else one["place"] in loopback
        assert where, one
        to_read = sockets.guard_of(one["kind"], one["process"]).startswith("none: figures")
        assert one["said"] in ("", "401", "CURVE") or to_read, one
    assert {one["said"] for one in found if "CURVE" in sockets.guard_of(one["kind"], one["process"])} == {"CURVE"}
    assert "401" in {one["said"] for one in found}  # some listeners were really contacted
    assert len([one for one in found if one["process"].startswith("ray::WorkerDict") and one["kind"] == "tcp"]) == 1


def test_no_secret_of_the_environment_is_on_record(finished):
    for file in (path for path in finished.rglob("*") if path.is_file()):
        assert PLANTED.encode() not in file.read_bytes(), file


def test_a_killed_run_resumes_with_the_same_sigma_and_noise(train, tmp_path, finished):
    untouched = leftovers()
    process = train(tmp_path)
    deadline = time.monotonic() + 700
    while not list(tmp_path.glob("runs/*/checkpoints/latest_checkpointed_iteration.txt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    kill(process)
    folder = newest(tmp_path)
    saved = int((folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved < 3, "the kill came too late to test anything"

    run, err = finish(train(tmp_path), tmp_path)
    assert run == folder
    assert "resumed" in err
    adapters = lines(folder / "evidence.jsonl", "adapter")
    before = next(record for record in adapters if record["step"] == saved)
    resumed = [record for record in adapters if record["step"] == saved][-1]
    assert resumed is not before
    assert resumed["sent"] == before["sent"], "the adapter after loading is not the one that was saved"

    # The same noise as an undisturbed run's, at every step, to the last bit.
    wanted = {record["step"]: record["weights_digest"] for record in lines(finished / "evidence.jsonl", "noise")}
    for record in lines(folder / "evidence.jsonl", "noise"):
        assert record["weights_digest"] == wanted[record["step"]]
    assert [record["step"] for record in lines(folder / "metrics.jsonl", "step")][-1] == 3
    # The responses to the same prompts are equal, too, up to floating-point effects after the first update.
    for one in agreement(RunFolder(finished), RunFolder(folder)):
        assert one.common == one.answers
        assert one.share == 1 or (one.part, one.step) not in (("val", 0), ("train", 1))
    assert leftovers() <= untouched, "what the killed attempt left behind is cleaned up by the one that resumes it"


def test_checkpoint_holds_the_adapter_only_and_no_noise(finished):
    (file,) = (finished / "checkpoints" / "global_step_3" / "actor").glob("model_world_size_1_rank_0.pt")
    names = list(torch.load(file, weights_only=False))
    assert names
    assert all("lora_" in name for name in names)


def test_eval_answers_as_the_run_did_and_changes_nothing_of_it(finished):
    before = leftovers()
    metrics = (finished / "metrics.jsonl").read_bytes()
    process = verl_aqn("eval", str(finished), "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    result = json.loads(out)
    (was,) = (record for record in lines(finished / "metrics.jsonl", "validation") if record["step"] == 3)
    assert (result["step"], result["precision"], result["items"]) == (3, "mxfp4", was["items"])
    assert result["scores"]["strict"]["accuracy"] == was["accuracy"]
    answers = [
        {line["input"]: line["output"] for line in lines(Path(file))}
        for file in (result["file"], finished / "validation" / "3.jsonl")
    ]
    assert answers[0] == answers[1]
    evidence = Path(result["run"]) / "evidence.jsonl"
    assert lines(evidence, "clean")  # read back before any response
    assert result["adapter"] == lines(finished / "evidence.jsonl", "adapter")[-1]["sent"]
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert lines(finished / "evaluations.jsonl") == [result]
    assert leftovers() <= before


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> Path:
    """The run's adapter, exported as a user does it."""
    before, folder = leftovers(), tmp_path_factory.mktemp("export") / "adapter"
    proof = export(finished.parent.parent, folder)
    assert leftovers() == before
    assert proof["adapter"]["digest"] == lines(finished / "evidence.jsonl", "adapter")[-1]["sent"]
    assert proof["nonzero_b"] == 14
    answers = proof["answers"]  # of the run's four validation problems, and of others of the same data
    assert (answers["prompts"], answers["recorded"]) == (32, 4)
    assert answers["equal"] > 16  # a random model has near ties between tokens
    assert answers["base_equal"] < 8
    assert answers["effect"]["error"] <= answers["effect"]["allowed"]  # of the real engine
    assert proof["proved"]
    return folder


def export(*arguments) -> dict:
    process = verl_aqn("export", *map(str, arguments), "--json")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out)


def test_what_a_sync_sends_is_the_adapter_and_no_more(finished, exported):
    size = sum(tensor.nbytes for tensor in load_file(exported / "adapter_model.safetensors").values())
    assert {record["bytes"] for record in lines(finished / "evidence.jsonl", "adapter")} == {size}
    assert {step["metrics"]["aqn/synced_bytes"] for step in lines(finished / "metrics.jsonl", "step")} == {size}


def in_plain_peft(base: Path, adapter: Path) -> tuple[list[int], torch.Tensor]:
    """A prompt, and the log-probabilities of the next tokens, which the adapter changes."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_model(base), str(adapter), autocast_adapter_dtype=False)
    prompt = tokenizer("Ann has 2 apples and", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].float()
        with model.disable_adapter():
            assert not torch.equal(model(torch.tensor([prompt])).logits[0, -1].float(), logits)
    return prompt, logits.log_softmax(-1)


def assert_served(tops: dict[str, float], ours: torch.Tensor) -> None:
    """Check an engine's most likely tokens: their log-probabilities are `ours`, and the first is nearly the best."""
    served = {int(token): logprob for token, logprob in tops.items()}
    assert max(abs(logprob - float(ours[token])) for token, logprob in served.items()) < 0.25
    assert float(ours.max() - ours[max(served, key=served.__getitem__)]) < 0.25


def test_an_exported_adapter_serves_in_plain_peft_and_in_vllm_without_our_worker(finished, exported):
    config = OmegaConf.load(finished / "config.yaml")
    config.actor_rollout_ref.rollout.engine_kwargs.vllm.pop("worker_extension_cls")
    base = Path(config.actor_rollout_ref.model.path)
    prompt, ours = in_plain_peft(base, exported)
    # No response is the expected one, so the most likely tokens are returned.
    (said,) = ask_engine(config, base, [exported], [prompt], ["\0"], [[]], of_run=True)
    assert_served(said["answers"][0]["tops"][0], ours)


def test_an_exported_adapter_serves_in_stock_vllm_over_the_bf16_equal_of_its_base(finished, exported, tmp_path):
    """This is without our plugin, which every other vLLM in this environment loads."""
    base = Path(OmegaConf.load(finished / "config.yaml").actor_rollout_ref.model.path)
    dequantize_checkpoint(base, tmp_path / "dense")
    prompt, ours = in_plain_peft(base, exported)
    answer = ask_vllm("stock", tmp_path / "dense", exported, prompt, VLLM_PLUGINS="")
    assert answer["ours"] == []
    assert_served(answer["tops"], ours)


def test_a_merged_export_is_a_bf16_model_that_answers_as_the_run(finished, exported):
    folder = exported.parent / "merged"
    proof = export(finished / "checkpoints/global_step_3", folder, "--merge")
    assert proof["merge"]["changed"] == proof["merge"]["tensors"] == 14
    assert proof["merge"]["kept"] > 0.9  # lr is 1e-2
    assert proof["merge"]["unchanged"] == []
    assert proof["proved"]
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base = Path(proof["base"]["path"])
    model = PeftModel.from_pretrained(load_model(base), str(exported), autocast_adapter_dtype=False)
    tokens = torch.arange(1000, 1032).view(2, 16)
    with torch.no_grad():
        far = (merged(tokens).logits - load_model(base)(tokens).logits).float().norm()
        near = (merged(tokens).logits - model(tokens).logits).float().norm()
    assert near < 0.2 * far


def evaluated(target: Path | str, *arguments: str, cache: Path) -> dict:
    """Return the output of `verl-aqn eval`, started as a user does."""
    before = leftovers()
    process = verl_aqn("eval", str(target), *arguments, "--json", cache=cache)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert leftovers() <= before
    result = json.loads(out)
    assert lines(Path(result["run"]) / "evidence.jsonl", "clean")  # read back before any response
    return result


def test_eval_of_a_folder_in_bf16_with_an_exported_adapter(finished, exported, warm_cache, tmp_path):
    base = OmegaConf.load(finished / "config.yaml").actor_rollout_ref.model.path
    where = [*TINY, "data.val_max_samples=2", f"aqn.run.dir={tmp_path}", "--adapter", str(exported)]
    result = evaluated(base, *where, "--precision", "bf16", cache=warm_cache)
    assert (result["precision"], result["base"], result["step"], result["items"]) == ("bf16", None, 0, 2)
    assert result["adapter"] == lines(finished / "evidence.jsonl", "adapter")[-1]["sent"]


@pytest.mark.parametrize("precision", ["bf16", "mxfp4"])
def test_eval_of_a_bf16_folder_as_it_is_and_quantised(finished, tiny_model, warm_cache, tmp_path, precision):
    options = [] if precision == "bf16" else ["--precision", precision]
    where = [*TINY, "data.val_max_samples=2", f"aqn.run.dir={tmp_path}"]
    result = evaluated(tiny_model, *where, *options, cache=warm_cache)
    assert (result["precision"], result["step"], result["items"]) == (precision, 0, 2)
    start, *_ = lines(Path(result["run"]) / "evidence.jsonl", "base")
    if precision == "bf16":
        assert (start["quantised"], result["base"]) == (False, None)
        said, _ = compared(Path(result["run"]))
        assert said.startswith(
            "base equal on disk, in the actor and in the rollout: 14 16-bit matrices, 5 norms, 1 embedding, 1 head ("
        )
    else:  # it is the base of the run that began with this folder
        assert result["base"] == start["disk"] == lines(finished / "evidence.jsonl", "base")[0]["disk"]


ONE_STEP = ["trainer.total_training_steps=1", "trainer.val_before_train=false", "aqn.noise.num_stages=1"]


@pytest.fixture(scope="module")
def rounded(train, tmp_path_factory) -> Path:
    """Folder of a run of two steps with 4-bit activations."""
    base = tmp_path_factory.mktemp("rounded")
    two_steps = ["trainer.total_training_steps=2", "trainer.val_before_train=false", "aqn.noise.num_stages=2"]
    rounding = ["aqn.mxfp4.activation=mxfp4", "aqn.mxfp4.cache_dequantized=true"]
    twice = [f"actor_rollout_ref.rollout.val_kwargs.{one}" for one in ("n=2", "do_sample=true", "temperature=1")]
    return finish(train(base, *two_steps, *rounding, *twice), base)[0]


def test_a_validation_with_two_answers_to_each_problem(rounded):
    items = lines(rounded / "validation" / "2.jsonl")
    assert [(item["item"], item["sample"]) for item in items] == [(n, s) for n in range(4) for s in range(2)]
    assert [item["input"] for item in items[::2]] == [item["input"] for item in items[1::2]]
    assert len({item["output"] for item in items}) > 4, "both answers to a problem are one"
    (record,) = lines(rounded / "metrics.jsonl", "validation")
    right = [items[n]["acc"] + items[n + 1]["acc"] for n in range(0, 8, 2)]
    assert (record["items"], record["samples"]) == (4, 2)
    assert record["accuracy"] == record["pass_at"]["1"] == pytest.approx(sum(right) / 8)
    assert record["pass_at"]["2"] == pytest.approx(sum(count > 0 for count in right) / 4)


def test_every_step_s_answers_are_on_record_by_digest(rounded):
    records = lines(rounded / "samples.jsonl")
    assert [(record["step"], record["count"], len(record["answers"])) for record in records] == [(1, 8, 8), (2, 8, 8)]
    assert records[0]["digest"] != records[1]["digest"]


def test_four_bit_activations_in_actor_and_rollout(rounded):
    for record in lines(rounded / "evidence.jsonl", "base"):
        assert record["actor_activations"] == [["even/nearest"]]
        assert record["rollout"][0]["activations"] == ["even/nearest"]
        assert record["rollout"][0]["weights_equal_base"]


def test_eight_bit_activations_in_actor_and_rollout(train, tmp_path):
    run, _ = finish(train(tmp_path, *ONE_STEP, "aqn.mxfp4.activation=mxfp8"), tmp_path)
    records = lines(run / "evidence.jsonl", "base")
    assert [record["when"] for record in records] == ["start", "end"]
    for record in records:
        assert record["activation"] == "mxfp8/floor/nearest"
        assert record["actor_activations"] == [["mxfp8/floor/nearest"]]
        assert record["rollout"][0]["activations"] == ["mxfp8/floor/nearest"]
        assert record["rollout"][0]["weights_equal_base"]


def test_eval_of_a_checkpoint_that_is_not_the_last_in_bf16(rounded, warm_cache):
    """The run has 4-bit activations, which a bf16 base cannot have."""
    result = evaluated(rounded / "checkpoints/global_step_1", "--precision", "bf16", cache=warm_cache)
    assert (result["precision"], result["base"], result["step"], result["items"]) == ("bf16", None, 1, 4)
    sent = {record["step"]: record["sent"] for record in lines(rounded / "evidence.jsonl", "adapter")}
    assert result["adapter"] == sent[1] != sent[2]
    used = OmegaConf.load(Path(result["run"]) / "config.yaml")
    assert used.aqn.mxfp4.activation == "none"
    assert "mxfp4_activation" not in used.actor_rollout_ref.model.override_config
    assert lines(rounded / "evaluations.jsonl") == [result]


def test_a_rollout_that_rounds_activations_unasked_stops_the_run(train, tmp_path):
    """vLLM does this by default on Blackwell; here a setting that the recipe does not know causes it."""
    key = "+actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.mxfp4_activation"
    process = train(tmp_path, *ONE_STEP, f"{key}=rceil/nearest")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "rounds activations as ['rceil/nearest'], but the recipe asks for 'none'" in err.replace("\n", " ")
    assert not lines(newest(tmp_path) / "metrics.jsonl", "step")


def test_ctrl_c_ends_everything_in_order(train, tmp_path):
    before = leftovers()
    process = train(tmp_path)
    deadline = time.monotonic() + 300
    while "loading the actor" not in str(lines_of(tmp_path)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = descendants(process.pid)
    assert len(children) > 3
    assert [child for child in children if worker.__file__ in " ".join(child.cmdline())], "Ray has its own program"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in err
    assert "Traceback" not in err
    assert not [child for child in children if child.is_running()]
    assert leftovers() <= before
