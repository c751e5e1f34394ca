"""What the proof of `verl-aqn export` detects: wrong exports, responses that decide nothing, invalid numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.helpers.export_runs import adapter_of, exported_run, packed_base, state_of, trained, transformers_engine
from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.merging import check_merged, write_merged
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.cli.export import lines_of
from verl_aqn.cli.main import app
from verl_aqn.errors import EnvironmentFault, EvidenceError
from verl_aqn.evaluation.export import exporting, trial
from verl_aqn.evaluation.export import trained_model as reference
from verl_aqn.evaluation.export.effect import ERROR, FLOOR, Effect, measure
from verl_aqn.evaluation.export.export_folders import write_peft_folder
from verl_aqn.evaluation.export.exporting import RECORD, export
from verl_aqn.evaluation.export.questions import read_questions
from verl_aqn.evaluation.export.source import find_source
from verl_aqn.evaluation.export.trained_model import Reference, logprobs
from verl_aqn.evaluation.export.trial import TELLING, Differing, Trial, judge, try_out

PROBLEMS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return packed_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def state(base) -> dict[str, torch.Tensor]:
    return state_of(trained(base, std=0.05))


@pytest.fixture
def run(base, state, tmp_path) -> Path:
    return exported_run(tmp_path / "experiment", base, state, problems=PROBLEMS)


@pytest.fixture
def engine(monkeypatch) -> None:
    monkeypatch.setattr(trial, "ask_vllm", transformers_engine)


# ---- log-probabilities ----


def effect_of(shown: list[list[float]], base: list[list[float]] | None = None) -> Effect:
    """Return the effect of an adapter that changes three tokens by 1, −2 and 2 nats."""
    without, with_it = [[-3.0, -4.0], [-5.0]], [[-2.0, -6.0], [-3.0]]
    return measure(Reference([[1, 2], [3]], ["", ""], without, with_it), shown, base or without)


def test_the_effect_of_right_and_wrong_exports():
    right = effect_of([[-2.0, -6.0], [-3.0]])
    assert right == Effect(3, pytest.approx(5 / 3), 0.0, 1.0, 0.0, 0.0)
    bare = effect_of([[-3.0, -4.0], [-5.0]])
    assert (bare.shown, bare.error) == (0, 1)
    twice = effect_of([[-1.0, -8.0], [-1.0]])
    assert (twice.shown, twice.error) == (2, 1)
    # Both implementations differ by as much on the base as on the export, so this is no error of the export.
    off = effect_of([[-1.5, -5.5], [-2.5]], [[-2.5, -3.5], [-4.5]])
    assert (off.error, off.apart) == (0, 0.5)
    assert off.floor == pytest.approx(math.sqrt(3) / 2 / 3)
    # The engine's context ended before the first answer.
    assert effect_of([[-2.0], [-3.0]]).tokens == 2
    none = measure(Reference([[1]], [""], [[-1.0]], [[-1.0]]), [[-1.0]], [[-1.0]])
    assert none == Effect(1, 0.0, 0.0, None, None, None)
    assert none.allowed is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("where", ["export", "base", "trainer"])
def test_a_log_probability_that_is_none_fails(bad, where):
    good = [[-2.0, -6.0], [-3.0]]
    values = {name: [[-2.0, -6.0], [bad if name == where else -3.0]] for name in ("export", "base", "trainer")}
    of_trainer = Reference([[1, 2], [3]], ["", ""], good, values["trainer"])
    with pytest.raises(EvidenceError):
        measure(of_trainer, values["export"], values["base"])


def test_log_probabilities_of_sequences_together_are_those_of_each_alone(base, monkeypatch):
    model = trained(base, std=0.05).float()
    prompts = [[300 + n, *range(310, 310 + 3 * n)] for n in range(5)]
    answers = [[400], [], [401, 402, 403, 404], [405, 406], [407]]
    with torch.no_grad():
        together = logprobs(model, prompts, answers)
        monkeypatch.setattr(reference, "TOGETHER", 1)
        alone = logprobs(model, prompts, answers)
        (logits,) = model(torch.tensor([prompts[2] + answers[2]])).logits.float().log_softmax(-1)
    assert list(map(len, together)) == list(map(len, answers))
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    start = len(prompts[2]) - 1
    assert alone[2] == pytest.approx([float(logits[start + n, token]) for n, token in enumerate(answers[2])], abs=1e-4)


def test_an_answer_that_vllm_did_not_score_fails():
    for shown, base in (([[-2.0, -6.0], []], None), ([[-2.0, -6.0], [-3.0]], [[-3.0, -4.0], []])):
        with pytest.raises(EvidenceError, match="no log-probability for the response to prompt 1"):
            effect_of(shown, base)


# ---- the verdict ----

GOOD = Effect(700, 0.3, 0.02, 1.0, ERROR / 2, FLOOR / 8)
TRIAL = Trial("the run", False, prompts=32, recorded=32, equal=32, base_equal=12, telling=20, telling_equal=20,
              differing=[], effect=GOOD)  # fmt: skip


def parted(gap: float | None, bound: float | None = 0.25) -> Differing:
    return Differing(0, 3, gap, bound, "expected", "other")


def test_a_good_trial_passes_and_is_proved():
    assert judge(TRIAL, 1.0).undecided == ""
    assert judge(replace(TRIAL, equal=31, telling_equal=19, differing=[parted(0.2)]), 1.0).undecided == ""


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, 0.26, 1.99])
def test_an_answer_that_parts_far_from_a_tie_fails(gap):
    with pytest.raises(
        EvidenceError, match="1 of 32 responses are not those of the run: 'other' instead of 'expected'"
    ):
        judge(replace(TRIAL, equal=31, differing=[parted(gap)]), 1.0)


def test_a_merged_model_may_part_anywhere_but_not_at_a_number_that_is_none():
    far = replace(TRIAL, merged=True, equal=30, differing=[parted(1.9, None), parted(None, None)])
    assert judge(far, 1.0).undecided == ""
    with pytest.raises(EvidenceError, match="1 of 32 responses are not those"):
        judge(replace(far, differing=[parted(math.nan, None)]), 1.0)


def test_gaps_within_their_bounds_do_not_make_up_for_answers_that_are_not_equal():
    """None of 32 responses was equal, and all diverged at an apparent near tie, but the export was accepted."""
    near = [parted(0.24)] * 32
    needed = TRIAL.required
    with pytest.raises(EvidenceError, match=rf"only 0 of these \(at least {needed} are needed\)"):
        judge(replace(TRIAL, equal=0, telling_equal=0, differing=near), 1.0)
    with pytest.raises(EvidenceError, match=f"only {needed - 1} of these"):
        judge(replace(TRIAL, equal=11 + needed, telling_equal=needed - 1), 1.0)
    judge(replace(TRIAL, equal=12 + needed, telling_equal=needed), 1.0)


@pytest.mark.parametrize("error", [ERROR * 1.01, 1.0, math.nan, None])
def test_an_export_that_does_something_else_than_the_adapter_fails(error):
    with pytest.raises(EvidenceError, match="missing or wrong"):
        judge(replace(TRIAL, effect=replace(GOOD, error=error)), 1.0)


@pytest.mark.parametrize("apart", [1.01, math.nan])
def test_another_base_in_vllm_fails_and_does_not_hide_behind_noise(apart):
    with pytest.raises(EvidenceError, match="do not compute the same model"):
        judge(replace(TRIAL, effect=replace(GOOD, apart=apart, floor=9.0)), 1.0)


HIDDEN = replace(GOOD, error=0.9, floor=FLOOR * 1.01)


@pytest.mark.parametrize("effect", [HIDDEN, None, Effect(9, 0.0, 0.0, None, None, None)])
def test_where_the_base_answers_alike_nothing_is_proved(effect, tmp_path):
    found = replace(TRIAL, base_equal=32 - TELLING + 1, telling=TELLING - 1, telling_equal=TELLING - 1, effect=effect)
    judged = judge(found, 1.0)
    assert judged.undecided
    said = "\n".join(lines_of(proof_of(judged), tmp_path))
    assert "this proof cannot distinguish the export from the base: " in said
    assert "proved" not in said


def proof_of(judged: Trial) -> dict:
    return {
        "run": "r", "step": 3, "merged": False, "merge": None, "nonzero_b": 14, "proved": not judged.undecided,
        "adapter": {"digest": "0" * 64, "recorded": "0" * 64, "read_back": "0" * 64, "modules": 14},
        "answers": judged.to_dict(),
    }  # fmt: skip


def test_share_and_bound_are_told(tmp_path):
    said = "\n".join(lines_of(proof_of(judge(TRIAL, 1.0)), tmp_path))
    assert "32 of 32 greedy responses equal those of the run" in said
    assert (
        "the bare base gives 12 of them; of 20 short responses that the base does not give, the export gives 20, "
        in said
    )
    assert f"at least {TRIAL.required} needed" in said
    assert f"{GOOD.error:.2f} of it is missing or wrong (at most {ERROR:.2f} allowed; the bare base has 1)" in said
    assert "proved: " in said


def test_a_record_of_an_earlier_version_is_told_and_not_called_proved(tmp_path):
    differing = {"prompt": 0, "token": 1, "gap": 0.1, "bound": 0.25, "expected": "a", "answer": "b"}
    answers = {"against": "the run's recorded validation", "prompts": 32, "recorded": 32, "equal": 31}
    proof = proof_of(TRIAL) | {"answers": answers | {"differing": [differing]}}
    del proof["proved"], proof["adapter"]["read_back"]
    said = "\n".join(lines_of(proof, tmp_path))
    assert (
        "31 of 32 greedy responses equal those of the run's recorded validation, the others differ within 0.1" in said
    )
    assert "proved" not in said


# ---- wrong exports, with responses of the exported model ----


def layers(adapter: Adapter, of: dict[int, int]) -> Adapter:
    def other(name: str) -> str:
        number = int(name.split(".")[2])
        return name.replace(f"layers.{number}.", f"layers.{of[number]}.")

    return replace(adapter, matrices={name: adapter.matrices[other(name)] for name in adapter.matrices})


def without(adapter: Adapter, *parts: str) -> Adapter:
    """Return the state with B set to zero in the modules whose names have one of `parts`."""
    matrices = {
        name: (a, torch.zeros_like(b) if any(part in name for part in parts) else b)
        for name, (a, b) in adapter.matrices.items()
    }
    return replace(adapter, matrices=matrices)


WRONG = {
    "alpha doubled": lambda adapter: replace(adapter, alpha=2 * adapter.alpha),
    "alpha halved": lambda adapter: replace(adapter, alpha=adapter.alpha / 2),
    "layers swapped": lambda adapter: layers(adapter, {0: 1, 1: 0}),
    "a layer missing": lambda adapter: without(adapter, "layers.1."),
    "half of it": lambda adapter: without(adapter, "q_proj", "o_proj", "up_proj"),
    "nothing of it": lambda adapter: without(adapter, "layers"),
}


@pytest.fixture(scope="module")
def sources(base, state, tmp_path_factory):
    """(source, its questions, adapter, tokenizer) of a run without a recorded answer."""
    source = find_source(exported_run(tmp_path_factory.mktemp("sources") / "run", base, state, problems=PROBLEMS))
    tokenizer = AutoTokenizer.from_pretrained(base)
    return source, read_questions(source, tokenizer), adapter_of(state), tokenizer


def tried(sources, exported: Adapter, folder: Path, engine) -> Trial:
    source, questions, adapter, tokenizer = sources
    folder.mkdir()
    write_peft_folder(folder, exported, source.base)
    return judge(try_out(source, questions, adapter, folder, False, tokenizer), 1.0)


def test_the_right_export_is_told_from_the_base(sources, engine, tmp_path):
    found = tried(sources, sources[2], tmp_path / "out", engine)
    assert found.effect.error < found.effect.allowed / 2
    assert not found.undecided


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_export_fails_though_no_answer_is_on_record(sources, engine, tmp_path, what):
    """In an earlier version both sides read the exported folder, and agreed."""
    with pytest.raises(EvidenceError):
        tried(sources, WRONG[what](sources[2]), tmp_path / "out", engine)


@pytest.mark.parametrize("what", WRONG)
def test_log_probabilities_alone_find_it(sources, engine, tmp_path, what, monkeypatch):
    monkeypatch.setattr(trial, "_differing", lambda *_: [])
    monkeypatch.setattr(trial, "TELLING", 99)
    with pytest.raises(EvidenceError, match="does not have the adapter's effect on log-probabilities"):
        tried(sources, WRONG[what](sources[2]), tmp_path / "out", engine)


@pytest.mark.parametrize("what", WRONG)
def test_a_folder_that_does_not_hold_the_adapter_fails_before_it_is_asked(run, what, tmp_path, monkeypatch):
    def wrongly(folder: Path, adapter: Adapter, base: Path) -> None:
        write_peft_folder(folder, WRONG[what](adapter), base)

    monkeypatch.setattr(exporting, "write_peft_folder", wrongly)
    monkeypatch.setattr(exporting, "try_out", None)
    with pytest.raises(EvidenceError, match="the exported adapter, as PEFT reads it, is not the one"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- merged ----


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_merged_model_is_read_back_bit_for_bit(base, state, run, tmp_path, monkeypatch, name):
    def damaging(folder: Path, *arguments):
        report = write_merged(folder, *arguments)
        file, offset = Weights(folder)._place[name]
        content = bytearray(file.read_bytes())
        content[offset] ^= 1
        file.write_bytes(content)
        return report

    monkeypatch.setattr(exporting, "write_merged", damaging)
    monkeypatch.setattr(exporting, "try_out", None)
    with pytest.raises(EvidenceError, match=rf"{name} in the merged folder is not, bit for bit, "):
        export(run, tmp_path / "out", merge=True)


def test_a_merged_model_of_another_adapter_or_config_is_found(base, state, tmp_path):
    adapter = adapter_of(state)
    (folder := tmp_path / "out").mkdir()
    report = write_merged(folder, base, True, adapter)
    assert check_merged(folder, base, True, adapter) == len(Weights(folder).specs)
    assert set(report.modules) == set(adapter.matrices)
    assert report.unchanged == []
    with pytest.raises(EvidenceError, match="is not, bit for bit, base"):
        check_merged(folder, base, True, replace(adapter, alpha=adapter.alpha * 1.1))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(EvidenceError, match=r"config\.json in the merged folder is not that of the base"):
        check_merged(folder, base, True, adapter)


def test_modules_that_rounding_gave_back_to_the_base_are_named(base, state, tmp_path):
    adapter = adapter_of(state)
    a, b = adapter.matrices[small := "model.layers.0.mlp.up_proj"]
    none = "model.layers.1.mlp.up_proj"
    matrices = adapter.matrices | {small: (a, b * 1e-6), none: (a, torch.zeros_like(b))}
    (folder := tmp_path / "out").mkdir()
    report = write_merged(folder, base, True, replace(adapter, matrices=matrices))
    assert set(report.unchanged) >= {none}
    assert report.modules[none] == {"elements_changed": 0, "kept": None}
    assert report.modules[small]["kept"] < 0.1
    kept = [one["kept"] for name, one in report.modules.items() if name not in (small, none)]
    assert min(kept) > 0.8


# ---- the command ----


def test_a_proof_that_cannot_decide_ends_well_and_says_so(base, tmp_path, monkeypatch):
    """The adapter has hardly changed, and the engine's kernels differ from the trainer's."""
    turn = iter(range(10**6))

    def noisy(*arguments, **named):
        said = transformers_engine(*arguments, **named)
        for one in said:
            one["logprobs"] = [[value + 0.1 * math.sin(next(turn)) for value in row] for row in one["logprobs"]]
        return said

    monkeypatch.setattr(trial, "ask_vllm", noisy)
    state = state_of(trained(base, std=1e-4))
    run = exported_run(tmp_path / "small", base, state, problems=4)
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "this proof cannot distinguish the export from the base" in result.stdout
    assert "proved" not in result.stdout
    proof = json.loads((tmp_path / "out" / RECORD).read_text())
    assert not proof["proved"]
    assert proof["adapter"]["read_back"] == proof["adapter"]["recorded"]
    assert "**not distinguished from the base**" in (tmp_path / "out/README.md").read_text()


def test_only_errors_of_writing_are_called_that(run, tmp_path, monkeypatch):
    def unreadable(*_):
        raise PermissionError(13, "Permission denied", "/somewhere/else/tokenizer.json")

    monkeypatch.setattr(exporting, "try_out", unreadable)
    with pytest.raises(PermissionError, match="somewhere/else"):
        export(run, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file/out"):
        export(run, tmp_path / "file/out")


def test_a_trainer_s_model_without_room_leaves_the_recorded_answers(sources, engine, tmp_path, monkeypatch):
    source, questions, adapter, tokenizer = sources

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (folder := tmp_path / "out").mkdir()
    write_peft_folder(folder, adapter, source.base)
    answers = trial.ask_trainer(source, questions, adapter, tokenizer).texts[:3]
    monkeypatch.setattr(trial, "ask_trainer", full)
    with pytest.raises(EnvironmentFault, match="does not fit on one device"):
        try_out(source, questions, adapter, folder, False, tokenizer)
    found = try_out(source, replace(questions, answers=answers), adapter, folder, False, tokenizer)
    assert (found.prompts, found.recorded, found.equal, found.effect) == (3, 3, 3, None)
    assert "does not fit on one device" in judge(found, 1.0).undecided
