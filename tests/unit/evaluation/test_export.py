"""`verl-aqn export`: what it reads from a checkpoint, what it writes, how it proves the result, what it rejects."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.lora.peft_helper import PEFTHelper

from tests.helpers.export_runs import (
    adapter_of,
    exported_run,
    packed_base,
    state_of,
    trained,
    transformers_engine,
    write_actor,
    write_training_data,
)
from tests.helpers.family_models import make as make_family
from tests.helpers.sharded_lora import Lora, save_sharded
from verl_aqn.checkpoints import merging_packed
from verl_aqn.checkpoints.foreign import import_checkpoint
from verl_aqn.checkpoints.formats import MODELSLIM_FORMATS
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.merging import MergeReport
from verl_aqn.checkpoints.modelslim import DESCRIPTION
from verl_aqn.checkpoints.packing import is_packed, quantize_checkpoint
from verl_aqn.cli.export import lines_of
from verl_aqn.config.serving import SERVED
from verl_aqn.errors import DataError, EvidenceError, ModelError
from verl_aqn.evaluation.export import exporting, trial
from verl_aqn.evaluation.export.difference import Difference, first_difference
from verl_aqn.evaluation.export.export_folders import target_modules
from verl_aqn.evaluation.export.exporting import RECORD, check_adapter, export
from verl_aqn.evaluation.export.fsdp_adapter import read_adapter
from verl_aqn.evaluation.export.questions import read_questions, training_prompts, validation_prompts
from verl_aqn.evaluation.export.source import find_source
from verl_aqn.evaluation.export.trained_model import calibration_rows
from verl_aqn.runs.provenance import model_digest

TOKENS = torch.arange(300, 324).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return packed_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def state(base) -> dict[str, torch.Tensor]:
    """The state of an fp32 adapter as the trainer saves it."""
    return state_of(trained(base))


@pytest.fixture(scope="module")
def rollout(base) -> PeftModel:
    """The model with the adapter in bf16, as in the rollout."""
    model = trained(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture
def run(base, state, tmp_path) -> Path:
    """A run without a recorded validation."""
    return exported_run(tmp_path / "experiment", base, state)


# ---- reading a checkpoint ----


def test_ranks_files_are_joined_bit_for_bit(tmp_path):
    folder = write_actor(tmp_path / "actor", [{}, {}])
    save_sharded(folder)
    adapter = read_adapter(folder)
    a, b = adapter.matrices["layer"]
    assert torch.equal(a, Lora().lora_A["default"].weight.bfloat16())
    assert torch.equal(b, Lora().lora_B["default"].weight.bfloat16())
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(DataError, match=r"rank_1\.pt does not exist"):
        read_adapter(folder)


class Harmful:
    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"harm.lora_A.default.weight": Harmful()}, DataError, "contains more than tensors and is not opened"),
        ({"m.lora_magnitude_vector.default.weight": torch.ones(3)}, ModelError, "only plain LoRA"),
        ({"m.lora_A.default.weight": torch.ones(8, 4)}, DataError, r"adapter of m in .* is \{'A': \[8, 4\]\}, not A"),
        ({"m.lora_A.default.weight": torch.ones(9, 4)}, DataError, "of r=6"),
    ],
)
def test_what_is_no_lora_is_refused_and_never_run(change, error, match, state, tmp_path, capfd):
    with pytest.raises(error, match=match):
        read_adapter(write_actor(tmp_path / "actor", [state | change]))
    assert "ran" not in capfd.readouterr().out


def test_a_checkpoint_without_lora_or_cut_off_is_refused(state, tmp_path):
    with pytest.raises(ModelError, match="has no LoRA tensor"):
        read_adapter(write_actor(tmp_path / "full", [{"model.norm.weight": torch.ones(3)}]))
    folder = write_actor(tmp_path / "cut", [state])
    file = folder / "model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DataError, match="damaged"):
        read_adapter(folder)
    (folder / "lora_train_meta.json").unlink()
    with pytest.raises(DataError, match=r"no lora_train_meta\.json"):
        read_adapter(folder)


# ---- finding it ----


def test_a_run_an_experiment_and_a_checkpoint_are_one_source(run):
    experiment = run.parent.parent
    places = [run, experiment, run / "checkpoints/global_step_3", experiment / "checkpoints/global_step_3"]
    found = {(source.run.path, source.step, source.sent) for source in map(find_source, places)}
    assert found == {(run, 3, find_source(run).sent)}
    assert find_source(run).packed


def test_bad_sources_are_refused(run, base, tmp_path):
    def refused(match: str, path: Path = run, error: type = DataError) -> None:
        with pytest.raises(error, match=match):
            find_source(path)

    refused("contains no run", tmp_path)
    stray = tmp_path / "checkpoints/global_step_3"
    stray.mkdir(parents=True)
    refused("contains no run", stray)
    refused("not written completely: the last complete checkpoint is global_step_3", run / "checkpoints/global_step_4")
    refused("newest ones are kept", run / "checkpoints/global_step_2")
    refused("is not a checkpoint of", run / "elsewhere/global_step_3")
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(base), "/nowhere/packed"))
    refused("base /nowhere/packed does not exist", error=ModelError)
    other = tmp_path / "other"
    quantize_checkpoint(base.parent / "tiny", other, "floor")
    config.write_text(text.replace(str(base), str(other)))
    refused("its digest is not", error=EvidenceError)
    config.write_text(text.replace(str(base), str(base.parent / "tiny")))
    refused("one of the two is packed", error=EvidenceError)
    config.write_text(text)
    (run / "evidence.jsonl").write_text("")
    refused("has no record of the adapter of step 3")
    (run / "checkpoints/latest_checkpointed_iteration.txt").unlink()
    refused("has no checkpoint")


def test_an_unquantised_base_that_is_another_now_is_refused(base, state, tmp_path):
    shutil.copytree(base.parent / "tiny", plain := tmp_path / "plain")
    run = exported_run(tmp_path / "experiment", plain, state)
    (run / "versions.json").write_text(json.dumps({"base": model_digest(plain)}))
    assert not find_source(run).packed
    with (plain / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x7f")
    with pytest.raises(EvidenceError, match="its digest is not"):
        find_source(run)


def test_a_target_that_exists_is_wrong_use_in_one_line(run, tmp_path):
    (tmp_path / "taken").mkdir()
    command = [sys.executable, "-m", "verl_aqn.cli", "export", str(run), str(tmp_path / "taken")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "taken already exists" in result.stderr


# ---- answers ----


def test_where_answers_part_and_how_near_a_tie():
    words = ["<end>", "a", "b", " c", "ab"]

    def decode(ids) -> str:
        return "".join(words[i] for i in ids if i)

    tops = [{1: -0.1, 2: -2.0}, {2: -0.5, 3: -0.75, 0: -3.0}, {0: -0.2, 1: -1.2}]
    answer = [1, 2, 0]
    assert first_difference(answer, tops, "a c", decode) == Difference(1, 0.25)
    assert first_difference(answer, tops, "a", decode) == Difference(1, 2.5)  # it ended
    assert first_difference(answer, tops, "aba", decode) == Difference(2, 1.0)  # it continued
    assert first_difference(answer, tops, "b", decode) == Difference(0, pytest.approx(1.9))
    assert first_difference(answer, tops, "xyz", decode) == Difference(0, None)
    assert first_difference(answer[:2], tops[:2], "abc", decode) == Difference(2, None)


@pytest.fixture
def engine(monkeypatch) -> None:
    monkeypatch.setattr(trial, "ask_vllm", transformers_engine)


@pytest.fixture
def validated(run, rollout, base) -> Path:
    """The run with its greedy validation on record."""
    source, tokenizer = find_source(run), AutoTokenizer.from_pretrained(base)
    prompts = read_questions(source, tokenizer).prompts
    lines = []
    for ids in prompts:
        tokens = []
        while len(tokens) < 6 and tokenizer.eos_token_id not in tokens:
            with torch.no_grad():
                tokens.append(int(rollout(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
        texts = [tokenizer.decode(some, skip_special_tokens=True) for some in (ids, tokens)]
        lines.append({"input": texts[0], "output": texts[1], "gts": "1", "acc": 0.0})
    (run / "validation/3.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    return run


@pytest.mark.parametrize(
    ("problems", "recorded", "prompts", "known"),
    [(40, 40, 32, 32), (40, 5, 32, 5), (40, 0, 32, 0), (7, 7, 7, 7), (7, 3, 7, 3)],
)
def test_the_proof_rests_on_32_prompts_those_with_a_recorded_answer_first(
    base, state, tmp_path, problems, recorded, prompts, known
):
    """With fewer prompts, all are used."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    source = find_source(exported_run(tmp_path / "many", base, state, problems=problems))
    everything = validation_prompts(source.config, tokenizer)
    assert len(everything) == problems
    answered = list(everything)[::-1][:recorded]
    records = [json.dumps({"input": text, "output": f"answer {number}"}) for number, text in enumerate(answered)]
    (source.run.path / "validation/3.jsonl").write_text("".join(line + "\n" for line in records))
    questions = read_questions(source, tokenizer)
    assert questions.answers == [f"answer {number}" for number in range(known)]
    assert questions.prompts[:known] == [everything[text] for text in answered[:known]]
    assert len({tuple(ids) for ids in questions.prompts}) == len(questions.prompts) == prompts


def test_the_adapter_as_peft_loads_it(validated, rollout, base, engine, tmp_path):
    proof = export(validated, tmp_path / "out")
    assert proof["answers"]["against"] == trial.RECORDED
    assert (proof["answers"]["prompts"], proof["answers"]["equal"]) == (4, 4)
    assert proof["adapter"]["digest"] == proof["adapter"]["recorded"]
    assert proof["nonzero_b"] == 14
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == proof
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    card = (tmp_path / "out/README.md").read_text()
    assert proof["adapter"]["digest"] in card
    assert proof["base"]["digest"] in card
    assert "max_lora_rank=8" in card
    assert not list(tmp_path.glob(".out*"))
    assert (base / "quantization.json").is_file()
    assert not (tmp_path / "out/quantization.json").exists()

    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(tensors) == 28
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    bases = load_model(base), AutoModelForCausalLM.from_pretrained(base.parent / "dense", dtype=torch.bfloat16)
    model, dense = (
        PeftModel.from_pretrained(one, str(tmp_path / "out"), autocast_adapter_dtype=False).eval() for one in bases
    )
    with torch.no_grad():
        logits = rollout(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, logits)
        assert torch.equal(dense(TOKENS).logits, logits)
        with model.disable_adapter():
            assert not torch.equal(model(TOKENS).logits, logits)


def test_without_a_recorded_validation_the_trainer_s_model_is_asked(run, engine, tmp_path):
    proof = export(run, tmp_path / "out")
    assert proof["answers"]["against"] == "the trainer's model (the run has no recorded greedy validation of this step)"
    assert (proof["answers"]["prompts"], proof["answers"]["recorded"]) == (4, 0)


def test_it_is_asked_where_the_run_recorded_too_few_and_the_command_says_so(validated, engine, tmp_path):
    file = validated / "validation/3.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    proof = export(validated, tmp_path / "out")
    assert (proof["answers"]["prompts"], proof["answers"]["recorded"], proof["answers"]["equal"]) == (4, 1, 4)
    whose = "the run's recorded validation (1) and of the trainer's model (3)"
    assert whose in (tmp_path / "out/README.md").read_text()
    said = lines_of(proof, tmp_path / "out")
    assert f"4 of 4 greedy responses equal those of {whose}" in said
    assert "proved: vLLM with the export behaves like the run's model" in said
    assert "the validation data have only these 4 prompts" in said


def test_a_merged_model_is_base_and_adapter_rounded_once(validated, state, base, engine, tmp_path):
    proof = export(validated, tmp_path / "out", merge=True)
    merged = load_file(tmp_path / "out/model.safetensors")
    dequantize_checkpoint(base, tmp_path / "dense")
    dense, adapter = load_file(tmp_path / "dense/model.safetensors"), adapter_of(state)
    assert merged.keys() == dense.keys()
    for name, weight in dense.items():
        if name.removesuffix(".weight") in adapter.matrices:
            a, b = adapter.matrices[name.removesuffix(".weight")]
            weight = (weight.double() + 2 * b.double() @ a.double()).bfloat16()
            assert (merged[name] != weight).float().mean() < 1e-3, name  # fp32 beside float64, at ties
            torch.testing.assert_close(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight), name
    assert (proof["merge"]["tensors"], proof["merge"]["changed"]) == (14, 14)
    assert proof["merge"]["kept"] == pytest.approx(1, abs=1e-2)
    assert proof["merge"]["actual_db"] == pytest.approx(proof["merge"]["expected_db"], abs=0.1)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (tmp_path / "out/generation_config.json").is_file() == (base / "generation_config.json").is_file()
    assert not (tmp_path / "out/quantization.json").exists()
    assert "kept 100 %" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"use_rslora": True}, (6, 12, True)),
        # vLLM does not read patterns: ranks are padded, and a module's scaling is multiplied into its B.
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 48}}, (6, 6, False)),
    ],
)
def test_an_export_is_scaled_as_the_run_was(base, engine, tmp_path, settings, written):
    """This holds for every reader: PEFT, vLLM's own rule, the merged model."""
    model = trained(base, std=0.05, **settings)
    scalings = {n.removeprefix("base_model.model."): m.scaling["default"] for n, m in model.named_modules()
                if isinstance(m, LoraLayer)}  # fmt: skip
    run = exported_run(tmp_path / "experiment", base, state_of(model), peft=model)
    proof = export(run, tmp_path / "out")
    assert (proof["rank"], proof["alpha"], proof["rslora"]) == written
    helper = PEFTHelper.from_local_dir(str(tmp_path / "out"), None)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, scaling in scalings.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        expected = scaling * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        a, b = (tensors[f"base_model.model.{name}.lora_{kind}.weight"].double() for kind in "AB")
        assert len(a) == helper.r
        assert (helper.vllm_lora_scaling_factor * b @ a - expected).norm() < 0.01 * expected.norm(), name
    assert ("rsLoRA" in (tmp_path / "out/README.md").read_text()) == written[2]

    export(run, tmp_path / "merged", merge=True)
    dequantize_checkpoint(base, tmp_path / "dense")
    merged, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "dense"))
    for name, scaling in scalings.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        expected = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        added = merged[f"{name}.weight"].float() - dense[f"{name}.weight"].float()
        assert (added - expected).norm() < 0.05 * expected.norm(), name


def test_a_run_that_began_with_an_adapter_and_did_not_record_its_scaling_is_refused(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lora_adapter_path: null", "lora_adapter_path: /some/adapter"))
    with pytest.raises(DataError, match=r"has no adapter_config\.json: .* train again"):
        export(run, tmp_path / "out")


def test_a_model_rounded_to_4_bits_again_is_packed_and_says_what_survived(validated, state, base, engine, tmp_path):
    write_training_data(validated)
    proof = export(validated, out := tmp_path / "out", merge=True, packed=True)
    assert (proof["merged"], proof["dtype"], proof["proved"]) == (True, "mxfp4", True)
    assert is_packed(out)
    survived, effect, rounding = proof["answers"]["survived"], proof["answers"]["effect"], proof["rounding"]
    assert survived["error"] < 0.6 < survived["shown"]  # the adapter's effect is left
    assert effect["error"] < 0.1  # the engine has the effect of these codes
    assert effect["size"] != survived["size"]
    assert 0 < rounding["output_error"] < 0.5
    assert rounding["tokens"] > 128 * 10
    said = lines_of(proof, out)
    card = (out / "README.md").read_text()
    share = f"on log-probabilities {100 * survived['shown']:.0f} % of the adapter's effect survived, and "
    for texts in (said, card.splitlines()):
        assert any(share in line for line in texts)
        assert any("for " + str(rounding["tokens"]) + " calibration tokens" in line for line in texts)
    assert "A packed MXFP4 model" in card
    assert any(
        line.startswith("proved: vLLM with the export behaves like the trainer's model with these") for line in said
    )
    assert not list(out.parent.glob(".out*"))
    assert {file.name for file in out.iterdir() if file.is_dir()} == set()


def test_calibration_texts_are_training_prompts_with_the_responses_of_the_policy(run, state, rollout, base):
    write_training_data(run)
    source, tokenizer = find_source(run), AutoTokenizer.from_pretrained(base)
    rows = calibration_rows(source, adapter_of(state), tokenizer)
    first, second = training_prompts(source.config, tokenizer, 2)
    answer = rollout.generate(torch.tensor([first]), max_new_tokens=6, do_sample=False)[0, len(first) :].tolist()
    assert rows.flatten()[: len(first + answer + second)].tolist() == first + answer + second


def test_4_bits_that_lost_the_adapter_are_refused(base, engine, monkeypatch, tmp_path):
    run = exported_run(tmp_path / "run", base, state_of(trained(base, std=1e-5)))
    write_training_data(run)
    with pytest.raises(EvidenceError, match="rounded to 4 bits, the model equals its base"):
        export(run, tmp_path / "out", merge=True, packed=True)
    # Codes that were changed at random are nearer to nothing.
    run = exported_run(tmp_path / "other", base, state_of(trained(base, std=0.01)))
    write_training_data(run)
    monkeypatch.setattr(
        merging_packed, "improve", lambda weight, codes, moment: codes._replace(packed=codes.packed ^ 1)
    )
    with pytest.raises(EvidenceError, match=r"no nearer to the trained policy than its base: .* export the adapter"):
        export(run, tmp_path / "out", merge=True, packed=True)
    assert not (tmp_path / "out").exists()


def test_an_engine_that_serves_other_codes_than_the_export_is_found(run, base, monkeypatch, tmp_path):
    """Such as the codes of the base."""
    write_training_data(run)
    monkeypatch.setattr(
        trial, "ask_vllm", lambda c, model, *rest, **named: transformers_engine(c, base, *rest, **named)
    )
    with pytest.raises(EvidenceError, match="does not have the effect of its own weights on log-probabilities"):
        export(run, tmp_path / "out", merge=True, packed=True)


@pytest.mark.parametrize("form", ["bf16", "mxfp4", "mxfp8"])
def test_the_export_is_tried_in_the_format_that_the_rollout_served(run, base, engine, monkeypatch, tmp_path, form):
    """Format bf16, as on an Ascend A2, or ModelSlim's for one of two formats of activations, as on a 950."""
    write_training_data(run)
    config = OmegaConf.load(run / "config.yaml")
    if form == "bf16":
        dequantize_checkpoint(base, tmp_path / "served")
    else:
        import_checkpoint(base, tmp_path / "served", MODELSLIM_FORMATS[form])
        config.aqn.mxfp4.activation = form
        config.aqn.mismatch.stop = 10  # transformers does not round activations as the trainer does
    OmegaConf.update(
        config, f"actor_rollout_ref.model.override_config.{SERVED}", str(tmp_path / "served"), force_add=True
    )
    OmegaConf.save(config, run / "config.yaml")
    asked = []

    def ask(config, model, *rest, of_run):
        description = model / DESCRIPTION
        asked.append((description.read_text() if description.is_file() else None, of_run, model))
        if form == "bf16":
            return transformers_engine(config, model, *rest, of_run=False)
        import_checkpoint(model, again := tmp_path / f"asked-{len(asked)}/again")
        return transformers_engine(config, again, *rest, of_run=True)

    monkeypatch.setattr(trial, "ask_vllm", ask)
    proof = export(run, out := tmp_path / "out", merge=True, packed=True)
    assert [of_run for _, of_run, _ in asked] == [True, True]
    assert asked[0][0] == asked[1][0]  # the schemes are those of the run's rollout
    assert (asked[0][0] is None) == (form == "bf16")
    assert asked[0][2] != asked[1][2] == tmp_path / "served"
    assert proof["merged"]
    assert proof["proved"] or form != "bf16"
    assert {file.name for file in out.iterdir() if file.is_dir()} == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "mxfp4"], "--format mxfp4 is for a merged model (an adapter is in bf16): add --merge"),
        (["--merge", "--format", "int4"], "--format int4 is not one of bf16, mxfp4"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(run, tmp_path, arguments, words):
    command = [sys.executable, "-m", "verl_aqn.cli", "export", str(run), str(tmp_path / "out"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr


def test_the_adapter_of_a_multimodal_base_is_known_by_the_names_that_vllm_got_and_only_merged(tmp_path):
    quantize_checkpoint(make_family("gemma3_vl", tmp_path / "source"), tmp_path / "packed")
    model = trained(tmp_path / "packed")
    run = exported_run(tmp_path / "experiment", tmp_path / "packed", state_of(model), peft=model)
    with pytest.raises(ModelError, match=r"packed is multimodal: .* export with --merge$"):
        export(run, tmp_path / "out")
    source = find_source(run)
    adapter = read_adapter(source.actor)
    assert check_adapter(source, adapter) == len(adapter.matrices) == 14


def test_4_bits_need_the_training_data_and_a_packed_base(run, base, state, engine, tmp_path):
    with pytest.raises(
        DataError, match="does not exist: the run's training data is needed to round the model to 4 bits"
    ):
        export(run, tmp_path / "out", merge=True, packed=True)
    dequantize_checkpoint(base, tmp_path / "dense")
    plain = exported_run(tmp_path / "plain", tmp_path / "dense", state)
    with pytest.raises(ModelError, match="is not MXFP4, so there are no 4 bits to return to"):
        export(plain, tmp_path / "out", merge=True, packed=True)


def test_a_small_update_is_said_to_be_lost_and_none_at_all_is_refused(base, engine, monkeypatch, tmp_path):
    """bf16 cannot represent a change below half of its last bit."""
    small = state_of(trained(base, std=2e-4))
    proof = export(exported_run(tmp_path / "small", base, small), tmp_path / "out", merge=True)
    assert proof["merge"]["kept"] < 0.5
    assert proof["merge"]["loss"] > 0.5
    monkeypatch.setattr(exporting, "write_merged", lambda *_: MergeReport(14, 0, 0.0, -99.0, -math.inf, 0.0, 1.0))
    with pytest.raises(EvidenceError, match="equals its base bit for bit"):
        export(tmp_path / "small", tmp_path / "none", merge=True)
    zero = state_of(trained(base, std=0.0))
    with pytest.raises(EvidenceError, match="every B is zero"):
        export(exported_run(tmp_path / "zero", base, zero), tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))


def test_another_adapter_and_other_answers_are_found_out(validated, base, engine, tmp_path):
    """A wrong checkpoint, and a right one whose folder gives different responses.

    No files of either remain.
    """
    file = validated / "checkpoints/global_step_3/actor/model_world_size_1_rank_0.pt"
    own = torch.load(file)
    torch.save(state_of(trained(base, seed=4)), file)
    with pytest.raises(EvidenceError, match="is not the one that the rollout had after step 3"):
        export(validated, tmp_path / "out")
    torch.save(own, file)
    lines = (validated / "validation/3.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"output": "entirely other words"}
    (validated / "validation/3.jsonl").write_text("\n".join([lines[0], json.dumps(broken), *lines[2:]]) + "\n")
    with pytest.raises(EvidenceError, match=r"1 of 4 responses are not those .* instead of 'entirely other words'"):
        export(validated, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    (validated / "validation/3.jsonl").write_text(json.dumps(broken | {"input": "unheard of"}) + "\n")
    with pytest.raises(DataError, match="restore the file that the run was validated on"):
        export(validated, tmp_path / "out")


def test_modules_are_named_in_full_where_their_last_names_mean_others_too(base, state):
    adapter = adapter_of(state)
    left = "model.layers.1.mlp.up_proj"
    del adapter.matrices[left]
    assert target_modules(adapter, base) == sorted(adapter.matrices)
