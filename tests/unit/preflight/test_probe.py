"""The effect of σ on the policy: exactness, keys, the search for a KL, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from scipy.stats import binomtest

from tests.helpers.outside_adapters import write_adapter
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.cli import main as cli
from verl_aqn.cli.main import app, main
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError, StrengthError
from verl_aqn.launch import train
from verl_aqn.launch.console import Console
from verl_aqn.launch.train import measure_noise, resolve
from verl_aqn.preflight import probe
from verl_aqn.preflight.probe import (
    CLEAR_GROUPS,
    SURE_GROUPS,
    Probe,
    Strength,
    check_strength,
    fit_sigma,
    measure,
    measure_start,
    strength,
    survey,
)
from verl_aqn.runs.folder import open_run
from verl_aqn.tasks.smollm2 import tiny_model

LETTERS = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    odd = len(solution_str) % 2
    return {"score": odd - 3.0, "acc": odd}  # a reward that is never above 0 and never equal to the accuracy


def never_nothing(solution_str, **kwargs):
    return {"score": 1.0 + len(solution_str) % 2, "acc": True}


def flat(solution_str, **kwargs):
    return {"score": 0.25, "acc": len(solution_str) % 2}
"""


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    model = tiny_model(folder / "tiny")
    (folder / "reward.py").write_text(LETTERS)
    patch = pytest.MonkeyPatch()
    patch.setenv("VERL_AQN_CACHE", str(folder / "cache"))
    yield [
        "profile=cpu",
        f"actor_rollout_ref.model.path={model}",
        "data.max_response_length=4",
        f"reward.custom_reward_function.path={folder / 'reward.py'}",
        "trainer.total_training_steps=6",
        "aqn.noise.num_stages=3",
    ]
    patch.undo()


@pytest.fixture(scope="module")
def prepared(overrides):
    return resolve(load_recipe("e12_aggressive_1ep", overrides))


@pytest.fixture(scope="module")
def prober(prepared):
    return Probe(prepared.config, prepared.steps, 4, 2)


def test_accuracy_is_of_acc_and_variance_of_the_reward_that_training_uses(prepared, overrides, prober):
    found = prober.measure(0)
    texts = [prober.tokenizer.batch_decode(group, skip_special_tokens=True) for group in prober.answers]
    odd = [[len(text) % 2 for text in group] for group in texts]
    assert 0 < sum(map(sum, odd)) < 8, "the test needs both"
    assert found.accuracy[0] == sum(map(sum, odd)) / 8
    assert found.variance[0] == sum(len(set(group)) > 1 for group in odd) / 4
    name = "reward.custom_reward_function.name="
    flat = resolve(load_recipe("e12_aggressive_1ep", [*overrides, f"{name}flat"]))
    same = Probe(flat.config, flat.steps, 4, 2).measure(0)
    assert (same.accuracy, same.variance[0]) == (found.accuracy, 0)
    always = resolve(load_recipe("e12_aggressive_1ep", [*overrides, f"{name}never_nothing"]))
    right = Probe(always.config, always.steps, 4, 2).measure(0)
    assert (right.accuracy[0], right.variance) == (1, found.variance)


def test_the_clean_policy_is_at_no_distance_and_noise_takes_it_away(prober):
    rows = survey(prober, [0.3, 0.003, 0.03])
    assert [row.sigma for row in rows] == [0, 0.003, 0.03, 0.3]
    assert rows[0].kl == (0, 0, 0)
    kls = [row.kl[0] for row in rows]
    assert kls == sorted(kls)
    assert kls[2] == pytest.approx(100 * kls[1], rel=0.3)  # as σ²
    assert all(low <= middle <= high for row in rows for middle, low, high in (row.kl, row.entropy, row.accuracy))


def test_same_seed_same_numbers_another_seed_others(prober, prepared):
    one = prober.measure(0.05)
    again = Probe(prepared.config, prepared.steps, 4, 2)
    assert again.measure(0.05) == one
    assert again.answers == prober.answers
    config = prepared.config.copy()
    config.aqn.noise.seed = 1
    assert Probe(config, prepared.steps, 4, 2).measure(0.05).kl != one.kl


def test_progress_counts_the_tokens_that_were_sampled(prepared):
    told: dict[str, list[int]] = {}
    most = 3 * 2 * int(prepared.config.data.max_response_length)

    def progress(done, total, label):
        assert total == most
        told.setdefault(label, []).append(done)

    prober = Probe(prepared.config, prepared.steps, 3, 2, progress=progress)
    prober.measure(0.05)
    assert list(told) == ["clean", "σ 0.05"]
    assert all(counts == sorted(counts) and counts[-1] <= most for counts in told.values())
    assert told["clean"][-1] == sum(len(answer) for group in prober.answers for answer in group)


def test_the_model_is_clean_afterwards_bit_for_bit(prober):
    before = {name: tensor.clone() for name, tensor in prober.model.state_dict().items()}
    with prober._noise(0.1):
        assert not torch.equal(prober.model.state_dict()["model.norm.weight"], before["model.norm.weight"])
    prober.measure(0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prober.model.state_dict().items())


def test_a_policy_that_begins_with_an_adapter_is_measured_with_it(prepared, prober, tmp_path):
    """The noise has the same names as without an adapter, which are the rollout's."""
    config = prepared.config.copy()
    base = Path(config.actor_rollout_ref.model.path)
    adapter = write_adapter(tmp_path / "adapter", load_model(base), use_rslora=True, target_modules=["q_proj"])
    config.actor_rollout_ref.model.lora_adapter_path = str(adapter)
    begun = Probe(config, prepared.steps, 4, 2)
    ids = torch.tensor([prober.prompts[0].ids])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_model(base, torch.float32), str(adapter))(ids).logits
        torch.testing.assert_close(begun.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(prober.model(ids).logits, expected, atol=1e-2)
    assert begun.injector.clean_digest == prober.injector.clean_digest
    assert begun.measure(0.05).kl[0] > 0


def test_batches_do_not_change_what_is_sampled_or_measured(prepared, prober, monkeypatch):
    """Shared prefix, left padding and dropped rows against one prompt at a time from its first token."""
    monkeypatch.setattr(measure, "_TOGETHER", 1)
    alone = Probe(prepared.config, prepared.steps, 4, 2)
    pairs = [pair for groups in zip(alone.answers, prober.answers, strict=True) for pair in zip(*groups, strict=True)]
    # A random model's distribution is so flat that rounding may change a draw to the next token.
    assert sum(one == other for one, other in pairs) >= len(pairs) - 1
    assert alone.measure(0.05).kl[0] == pytest.approx(prober.measure(0.05).kl[0], rel=1e-3)
    ids = prober.prompts[0].ids + prober.answers[0][0][:-1]
    with torch.inference_mode():
        logits = prober.model(torch.tensor([ids])).logits[0, len(prober.prompts[0].ids) - 1 :]
        ours = prober.model.get_output_embeddings()(prober.clean_states[0])
    torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", ["absolute", "rms", "multiplicative"])
def test_sigma_by_kl_in_every_unit(prepared, unit):
    config = prepared.config.copy()
    config.aqn.noise.unit, config.aqn.noise.target_kl = unit, 0.02
    found = fit_sigma(config, prepared.steps)
    assert found.kl[0] == pytest.approx(0.02, rel=0.05)
    assert config.aqn.noise.sigma_start == found.sigma
    assert config.aqn.noise.sigma_end / found.sigma == pytest.approx(1e-5 / 0.05, rel=1e-5)
    again = Probe(config, prepared.steps, probe.PROMPTS, 1, probe.FIT_TOKENS).measure(found.sigma, sampled=False)
    assert again == found


def test_sigma_by_kl_on_linear_layers_and_unquantised(prepared, overrides):
    config = prepared.config.copy()
    config.aqn.noise.targets, config.aqn.noise.target_kl = ["linear"], 0.02
    assert fit_sigma(config, prepared.steps).kl[0] == pytest.approx(0.02, rel=0.05)
    dense = resolve(load_recipe("e12_aggressive_1ep", [*overrides, "aqn.mxfp4.enabled=false"]))
    assert measure_start(dense.config, dense.steps)[1].kl[0] > 0


def test_plan_resolves_a_kl(overrides):
    found = resolve(load_recipe("e12_aggressive_1ep", [*overrides, "aqn.noise.target_kl=0.05"]))
    assert found.fitted.sigma == found.config.aqn.noise.sigma_start
    assert found.fitted.kl[0] == pytest.approx(0.05, rel=0.05)


def test_refuses(prepared, overrides):
    with pytest.raises(ConfigError, match="target_kl is -1"):
        load_recipe("e12", ["profile=cpu", "aqn.noise.target_kl=-1"])
    config = prepared.config.copy()
    config.aqn.noise.target_kl = 1e12
    with pytest.raises(ConfigError, match=r"target_kl=1e\+12 is not reached: KL is"):
        fit_sigma(config, prepared.steps)
    for override, message in (
        ("aqn.noise.enabled=false", "there is no noise to measure"),
        ("trainer.total_training_steps=1", "σ is 0 at each of the 1 steps"),
        ("actor_rollout_ref.rollout.top_p=0.5", r"from the whole vocabulary: .* actor_rollout_ref\.rollout\.top_p=1"),
        ("actor_rollout_ref.rollout.top_k=50", r"actor_rollout_ref\.rollout\.top_k=-1"),
    ):
        wrong = resolve(load_recipe("e12_aggressive_1ep", [*overrides, override]))
        with pytest.raises(ConfigError, match=message):
            Probe(wrong.config, wrong.steps, 2, 2)
    with pytest.raises(ConfigError, match="no such file"):
        resolve(load_recipe("e12_aggressive_1ep", [*overrides, "reward.custom_reward_function.path=/nowhere.py"]))


def test_a_sigma_that_leaves_nothing_names_the_largest_that_does():
    def row(sigma: float, limit: float = 0.02) -> Strength:
        share = (0.5, 0.3, 0.7) if sigma <= limit else (0.0, 0.0, 0.2)
        return Strength(sigma, (sigma, 0, 1), (1, 1, 1), share, share)

    fake = SimpleNamespace(measure=row, order=SimpleNamespace(unit="rms"), samples=4, prompts=[0] * 8)
    rows = [row(sigma) for sigma in (0, 0.01, 0.05, 0.1)]
    check_strength(fake, rows, 0.01)
    with pytest.raises(
        StrengthError, match=r"0\.05 \(rms\) leaves nothing.* the largest σ with reward variance is about 0\.018"
    ):
        check_strength(fake, rows, 0.05)
    nothing = SimpleNamespace(**{**vars(fake), "measure": lambda sigma: row(sigma, 0)})
    with pytest.raises(StrengthError, match="has none either"):
        check_strength(nothing, [row(0), row(0.05, 0)], 0.05)
    check_strength(fake, [row(0, -1), row(0.05)], 0.05)  # the clean policy has no reward variance either


def test_command(overrides, capsys, tmp_path, monkeypatch):
    small = [*overrides, "--sigma", "0.01", "--prompts", "3", "--samples", "2"]
    arguments = ["probe", "e12_aggressive_1ep", *small]
    monkeypatch.setattr(probe, "check_strength", lambda measured, rows, sigma: None)  # by chance, with so few responses
    app([*arguments, "--json", "--plot", str(tmp_path / "p.png")], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [row["sigma"] for row in found["rows"]] == [0, 0.01, 0.05]
    assert (found["unit"], found["step"]) == ("rms", 2)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    def strong(measured, rows, sigma):
        raise StrengthError("too strong")

    monkeypatch.setattr(probe, "check_strength", strong)
    monkeypatch.setattr(cli.sys, "argv", ["verl-aqn", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out = capsys.readouterr()
    assert "← σ_start" in out.out
    assert out.err.splitlines()[-1] == "error: too strong"
    monkeypatch.setattr(cli.sys, "argv", ["verl-aqn", "probe", "e12", "--sigma", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_a_run_measures_its_start_once_and_says_so(prepared, overrides, tmp_path, capsys):
    run = open_run(tmp_path, {})
    off = resolve(load_recipe("e12_aggressive_1ep", [*overrides, "aqn.noise.probe=false"]))
    measure_noise(run, off, Console())
    assert not list(run.read("evidence.jsonl")), "only where a recipe asks for it"
    measure_noise(run, prepared, Console())
    (record,), said = run.read("evidence.jsonl"), capsys.readouterr().err
    assert record["noisy"]["sigma"] == 0.05
    assert record["noisy"]["variance"][0] > 0
    assert "strength σ 0.05: KL" in said
    assert "groups with variance" in said
    measure_noise(run, prepared, Console())
    assert list(run.read("evidence.jsonl")) == [record], "also where the run was resumed"
    run.close()


def test_a_start_with_the_same_inputs_is_not_measured_again(prepared, tmp_path, monkeypatch):
    """The figures of the first run are used while the config, the files, the commit and the packages are equal."""
    rows = [Strength(0.0, (0, 0, 0), (1, 1, 1), (0.5, 0, 1), (1.0, 0, 1), 0.0)]
    rows.append(replace(rows[0], sigma=0.05, kl=(0.1, 0.05, 0.2), accuracy=None, variance=None))
    measured = []
    monkeypatch.setattr(probe, "measure_start", lambda config, steps, progress: measured.append(config) or rows)
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    clean = {"dirty": False, "commit": "a", "base": "b"}

    def start(number, versions=clean, config=prepared.config):
        monkeypatch.setattr(train, "versions_now", lambda config: versions)
        run = open_run(tmp_path / str(number), {})
        measure_noise(run, replace(prepared, config=config), Console())
        (record,) = run.read("evidence.jsonl")
        run.close()
        assert Strength.from_dict(record["noisy"]) == rows[1]
        return len(measured)

    ours = prepared.config.copy()
    ours.reward.custom_reward_function.path = load_recipe("e12", ["profile=cpu"]).reward.custom_reward_function.path
    assert [start(1, config=ours), start(2, config=ours)] == [1, 1]
    assert start(3, {**clean, "base": "c"}, ours) == 2
    other = ours.copy()
    other.aqn.noise.sigma_end = 1e-3
    assert start(4, config=other) == 3
    assert [start(n, {**clean, "dirty": True}, ours) for n in (5, 6)] == [4, 5], "code that is not committed"
    unknown = ({"commit": None, "dirty": None}, {"commit": None, "dirty": False}, {"commit": "a", "dirty": None})
    assert [start(f"unknown{n}", {**clean, **unknown[n // 2]}, ours) for n in range(6)] == list(range(6, 12))
    assert [start(n) for n in (7, 8)] == [12, 13], "a user's own reward function may have changed"
    edited = open_run(tmp_path / "edited", {})
    edited.write_text("versions.json", json.dumps({**clean, "base": "d"}))  # the first attempt crashed, then an edit
    edited.close()
    assert start("edited", {**clean, "base": "d", "dirty": True}, ours) == 14
    assert start("later", {**clean, "base": "d"}, ours) == 15, "not the figures of the edited code"
    (file, *_) = (tmp_path / "cache" / "strength").iterdir()
    for damaged in ("", "[]", '[{"sigma": 1}, {}]'):
        for one in file.parent.iterdir():
            one.write_text(damaged)
        measured.clear()
        assert start(f"damaged{len(damaged)}", config=ours) == 1


def test_no_rewards_are_measured_where_the_answers_need_tools(prepared, capsys):
    """A tool call is no final answer. It would be scored as wrong, and a good σ would be rejected."""
    config = prepared.config.copy()
    config.actor_rollout_ref.rollout.agent.default_agent_loop = "tool_agent"
    told = []
    clean, noisy = measure_start(config, prepared.steps, lambda *one: told.append(one))
    assert {label for *_, label in told} == {"clean"}
    assert (clean.accuracy, clean.variance, noisy.accuracy, noisy.variance) == (None,) * 4
    assert noisy.kl[0] > 0
    Console().strength(clean, noisy)
    assert "of the first turn" in capsys.readouterr().err


@pytest.fixture(scope="module")
def too_strong(overrides):
    """Logits so large that all samples of a prompt are equal: no group has variance."""
    return [*overrides, "aqn.noise.sigma_start=400", "reward.custom_reward_function.name=never_nothing"]


def test_a_run_whose_sigma_leaves_nothing_ends_before_anything_is_started(too_strong, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "check_stated", lambda config: None)
    monkeypatch.setattr(train, "check_model", lambda config: None)
    monkeypatch.setattr(train, "check_machine", lambda config: None)
    monkeypatch.setattr(train, "supervise", lambda run, console, ahead: pytest.fail("Ray would have been started"))
    runs = []
    monkeypatch.setattr(train, "open_run", lambda *args, **kwargs: runs.append(open_run(*args, **kwargs)) or runs[-1])
    for _ in range(2):  # the second time the dead run is resumed, and rejected as well
        with pytest.raises(
            StrengthError, match=r"sigma_start=400 \(rms\) leaves nothing.* σ with reward variance is about"
        ) as error:
            train.train("e12_aggressive_1ep", [*too_strong, f"aqn.run.dir={tmp_path}"])
        runs[-1].close()  # a process has only one run, and holds its lock to the end
    (state,) = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/state.json")]
    assert (state["status"], state["attempt"], state["message"]) == ("failed", 2, str(error.value))
    largest = float(str(error.value).split()[-1])
    again = resolve(load_recipe("e12_aggressive_1ep", [*too_strong, f"aqn.noise.sigma_start={largest}"]))
    assert measure_start(again.config, again.steps)[1].variance[0] > 0


def test_a_critic_is_not_refused_flat_groups(too_strong):
    prepared = resolve(load_recipe("ppo", too_strong))
    assert measure_start(prepared.config, prepared.steps)[1].variance[0] == 0


def test_a_few_flat_groups_are_no_reason_to_stop(prepared, monkeypatch):
    """With noise none of 8 groups varies: more are sampled, and only a clear difference in those counts."""

    def start(clean: dict[int, int], noisy: dict[int, int]) -> list[Strength]:
        """Return `measure_start` with this many groups with variance, by the number of groups."""

        class Fake:
            order = SimpleNamespace(sigma=0.05, unit="rms")

            def __init__(self, config, steps, prompts, samples, progress):
                self.prompts, self.samples = range(prompts), samples

            def measure(self, sigma):
                count = len(self.prompts)
                share = {0.0: clean, 0.05: noisy}.get(sigma, clean)[count] / count
                return Strength(sigma, (0, 0, 0), (1, 1, 1), (share / 2, 0, 1), (share, 0, 1))

        monkeypatch.setattr(strength, "Probe", Fake)
        return measure_start(prepared.config, prepared.steps)

    assert start({8: 0}, {8: 0})[1].variance[0] == 0  # the clean policy has no reward variance either
    assert start({8: 1}, {8: 1})[1].variance[0] == 1 / 8
    assert start({8: 8, 32: 32}, {8: 0, 32: 1})[1].variance[0] == 1 / 32
    assert start({8: 2, 32: CLEAR_GROUPS - 1}, {8: 0, 32: 0})[1].variance[0] == 0
    with pytest.raises(StrengthError, match=r"no group of 8 responses to 32 prompts has reward variance"):
        start({8: 2, 32: CLEAR_GROUPS}, {8: 0, 32: 0})


def test_the_numbers_of_a_start_are_what_their_comments_say():
    # Exact McNemar of n groups that lost their variance, and none that got one.
    assert binomtest(CLEAR_GROUPS, CLEAR_GROUPS).pvalue < 0.05 < binomtest(CLEAR_GROUPS - 1, CLEAR_GROUPS - 1).pvalue
    high = binomtest(0, SURE_GROUPS, alternative="less").proportion_ci().high
    assert high == pytest.approx(0.089, abs=5e-4)
    assert high < 1 / 11
