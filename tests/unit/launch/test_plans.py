"""Plans: what is rejected before the first run, the order of runs, and what is skipped, retried or left out."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from verl_aqn.config.compose import find_recipe, load_recipe, plan_names
from verl_aqn.config.schema import typed
from verl_aqn.errors import BusyError, ConfigError, EnvironmentFault, Stopped
from verl_aqn.launch import sweep as plans
from verl_aqn.launch import train
from verl_aqn.launch.plan import Plan, read_plan
from verl_aqn.launch.supervise import Outcome
from verl_aqn.launch.sweep import Series
from verl_aqn.launch.train import Prepared, identity
from verl_aqn.preflight.prepare import tell_workers
from verl_aqn.runs.folder import open_run
from verl_aqn.runs.provenance import provenance
from verl_aqn.runs.stats.arms import beyond, settings_of

ARMS = {"control": {"recipe": "e6a"}, "noisy": {"recipe": "e12"}}


def written(tmp_path, **changes):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"arms": ARMS, "seeds": [0, 1], **changes}, sort_keys=False))
    return path


def conditional(**when):
    return {**ARMS, "c": {"recipe": "e12", "when": when}}


def test_a_recipe_is_no_plan():
    assert read_plan(find_recipe("e12"), []) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [0]}, "unknown key seed: did you mean 'seeds'"),
        ({"seeds": []}, "give at least one seed, and each seed once"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"seeds": ["a"]}, r"seeds\[0\] must be a int"),
        ({"arms": {}}, "arms must be a mapping from names"),
        ({"arms": {"a/b": {"recipe": "e12"}}}, "a name of letters"),
        ({"arms": {"a": {}}}, "and a recipe"),
        ({"arms": {"a": {"recipes": "e12"}}}, r"unknown key arms\.a\.recipes: did you mean 'recipe'"),
        ({"arms": {1: {"recipe": "e12"}}}, r"arms\.1: quote the name"),
        ({"arms": {"a": {1: "a"}}}, r"unknown key arms\.a\.1: valid: overrides, recipe, when"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"overrides": "a=b"}, "overrides must be a list of key=value, got 'a=b'"),
        ({"arms": {"a": {"recipe": "e12", "overrides": "a=b"}}}, r"arms\.a\.overrides must be a list of key=value"),
        ({"contrasts": "a"}, "contrasts must be a list of lists"),
        (
            {"arms": conditional(arm="noisy", above="nosy")},
            r"c\.when names 'nosy', which is not an arm: use one of control, noisy$",
        ),
        ({"arms": conditional(arm="noisy", above="c")}, "names 'c', which has a condition itself"),
        ({"arms": conditional(arm="noisy")}, r"arms\.c\.when\.above is missing"),
        ({"contrasts": [["noisy", "e12"]]}, "is not a pair .* of control, noisy"),
        ({"contrasts": [["noisy", "noisy"]]}, "is not a pair"),
        ({"looks": [5, 4]}, r"looks=\[5, 4\]: give growing numbers of seeds, from 3 on"),
        ({"looks": [3, 3]}, "give growing numbers"),
        ({"looks": [2]}, "from 3 on"),
        (
            {"seeds": [0, 1, 2], "looks": [3], "arms": conditional(arm="noisy", above="control")},
            "a plan that may end early has no cond",
        ),
    ],
)
def test_what_a_plan_cannot_say(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_plan(written(tmp_path, **changes), [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"arms: [", b"\xff\xfe"])
def test_a_file_that_is_no_yaml(tmp_path, content):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not YAML"):
        read_plan(tmp_path / "plan.yaml", [])


def test_seeds_and_overrides_of_the_command_line_come_last(tmp_path):
    plan = read_plan(written(tmp_path, overrides=["profile=cpu"]), ["seeds=[7]", "data.seed=3"])
    assert plan.seeds == (7,)
    assert plan.overrides == ("profile=cpu", "data.seed=3")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seeds=[0,1", r"seeds=\[0,1 is not a YAML list: give seeds=\[0,1,2\]"),
        ("seeds=3", "seeds must be a list of whole numbers, got 3"),
    ],
)
def test_seeds_of_the_command_line_that_are_no_list(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_plan(written(tmp_path), [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [("aqn.seed=7", r"give seeds=\[7\]"), ("+trainer.experiment_name=x", "rename the arm")],
)
def test_what_a_plan_gives_its_runs_itself_is_not_taken(tmp_path, override, words):
    arms = {**ARMS, "noisy": {"recipe": "e12", "overrides": [override]}}
    for changes, overrides in (({}, [override]), ({"overrides": [override]}, []), ({"arms": arms}, [])):
        with pytest.raises(ConfigError, match=words):
            read_plan(written(tmp_path, **changes), overrides)


def test_order_is_seed_by_seed_and_conditional_arms_come_last():
    arms = {**ARMS, "long": {"recipe": "e12_2ep", "when": {"arm": "noisy", "above": "control"}}}
    plan = typed(Plan, {"arms": arms, "seeds": [0, 1]}, "")
    assert list(plan.runs(False)) == [("control", 0), ("noisy", 0), ("control", 1), ("noisy", 1)]
    assert list(plan.runs(True)) == [("long", 0), ("long", 1)]
    assert plan.pairs == [("noisy", "control"), ("long", "control")]


@pytest.fixture
def light(monkeypatch, tmp_path):
    """Recipes are composed but no model is quantised; `outcomes` gives the result of each run."""
    outcomes, taken = {}, []
    model = tmp_path / "model"
    model.mkdir()

    def resolve(config, fit=True):
        config.actor_rollout_ref.model.path = str(model)
        return Prepared(config=config, steps=29, rows={"train": 1, "test": 4}, source=model)

    @contextmanager
    def ready(config):
        yield resolve(config), None

    def execute(prepared, base, console, ahead):
        name = f"{prepared.config.trainer.experiment_name}-{prepared.config.aqn.seed}"
        taken.append(name)
        result = outcomes.get(name, [1, 0, 1, 0])
        if isinstance(result, Exception):
            raise result
        run = open_run(base, identity(prepared.config), fresh=prepared.config.aqn.run.fresh)
        run.write_text("config.yaml", yaml.safe_dump(identity(prepared.config)))
        run.write_text("versions.json", json.dumps(train.versions_now(prepared.config)))
        status = result if isinstance(result, str) else "finished"
        if status == "finished":
            run.append(
                "metrics.jsonl",
                {"kind": "validation", "step": 29, "accuracy": sum(result) / len(result), "items": len(result)},
            )
            (run.path / "validation").mkdir()
            for number, acc in enumerate(result):
                run.append("validation/29.jsonl", {"input": f"{number}?", "output": "", "gts": "1", "acc": acc})
        run.set_status(status)
        run.close()
        return run, Outcome(status, "" if status == "finished" else "it broke")

    monkeypatch.setattr(plans, "resolve", resolve)
    monkeypatch.setattr(plans, "ready", ready)
    monkeypatch.setattr(plans, "execute", execute)
    monkeypatch.setattr(train, "data_files", lambda config: [f for f in [config.data.train_files] if Path(f).is_file()])
    return outcomes, taken


def series(tmp_path, **changes):
    path = written(tmp_path, **changes)
    return Series(read_plan(path, ["profile=cpu", f"aqn.run.dir={tmp_path / 'out'}"]), path)


def test_each_run_once_and_the_comparison_at_the_end(light, tmp_path, capsys):
    outcomes, taken = light
    outcomes |= {"noisy-0": [1, 1, 1, 1], "noisy-1": [1, 1, 1, 0]}
    assert series(tmp_path).run() == 0
    assert taken == ["control-0", "noisy-0", "control-1", "noisy-1"]
    first = capsys.readouterr()
    assert "noisy against control" in first.out
    assert "+37.5 points" in first.out

    assert series(tmp_path).run() == 0  # all on record: nothing runs, the same comparison
    assert len(taken) == 4
    again = capsys.readouterr()
    assert again.out == first.out
    assert "noisy, seed 1: finished before, 75.0 % (3 of 4" in again.err


def test_more_seeds_run_only_what_is_new(light, tmp_path):
    _, taken = light
    series(tmp_path).run()
    del taken[:]
    assert series(tmp_path, seeds=[0, 1, 2]).run() == 0
    assert taken == ["control-2", "noisy-2"]


def test_two_processes_at_one_plan_run_nothing_twice(light, tmp_path, capsys):
    outcomes, taken = light
    arms = ARMS | {"c": {"recipe": "e12_aggressive_1ep", "when": {"arm": "noisy", "above": "control"}}}
    outcomes |= {"noisy-1": [1, 1, 1, 1]}
    first, second = series(tmp_path, arms=arms), series(tmp_path, arms=arms)
    assert first.run_one("control", 0)
    assert first.run_one("noisy", 1)  # its condition depends on the runs of both processes
    del taken[:]
    assert second.run() == 0
    assert taken == ["noisy-0", "control-1", "c-0", "c-1"]
    assert len(second.done) == 6
    capsys.readouterr()


def test_what_another_process_is_at_did_not_fail_where_it_is_finished_at_the_end(light, tmp_path, monkeypatch):
    light[0]["noisy-0"] = BusyError("a run is in progress")
    mine, other = series(tmp_path), series(tmp_path)
    ours = mine.run_one

    def finished_meanwhile(arm, seed):
        done = ours(arm, seed)
        if (arm, seed) == ("control", 1):
            light[0]["noisy-0"] = [1, 1, 1, 0]
            assert other.run_one("noisy", 0)
        return done

    monkeypatch.setattr(mine, "run_one", finished_meanwhile)
    assert mine.run() == 0
    assert len(mine.done) == 4


def test_a_run_that_fails_does_not_end_the_plan_and_is_tried_again(light, tmp_path, capsys):
    outcomes, taken = light
    outcomes["control-0"] = "failed"
    outcomes["noisy-1"] = BusyError("a run is in progress")
    assert series(tmp_path).run() == 1
    assert taken == ["control-0", "noisy-0", "control-1", "noisy-1"]
    err = capsys.readouterr().err
    assert "it broke" in err
    assert "noisy, seed 1 did not finish" in err
    outcomes.clear()
    del taken[:]
    assert series(tmp_path).run() == 0
    assert taken == ["control-0", "noisy-1"]


MANY = {"seeds": [0, 1, 2, 3, 4], "looks": [3, 4, 5, 9]}


def clear(outcomes, seeds, items=200):
    """Let the arm `noisy` be 60 points better with these seeds; a few items differ from seed to seed."""
    for seed in seeds:
        for arm, right in (("control", 40), ("noisy", 160)):
            outcomes[f"{arm}-{seed}"] = [1] * (right + seed) + [0] * (items - right - seed)


def test_a_plan_ends_at_the_first_look_at_which_every_contrast_has_a_verdict(light, tmp_path, capsys):
    outcomes, taken = light
    clear(outcomes, range(5))
    plan = series(tmp_path, **MANY)
    plan.preview()
    rule = (
        "ends after 3, 4 seeds if then every contrast has a verdict, else after 5; intervals are corrected for 3 looks"
    )
    assert rule in capsys.readouterr().out
    assert plan.run() == 0
    assert taken == ["control-0", "noisy-0", "control-1", "noisy-1", "control-2", "noisy-2"]
    told = capsys.readouterr()
    assert rule in told.err, "the rule is said before the first run"
    assert "ended by its rule after 3 seeds" in told.err
    assert "1 contrast at 3 looks" in told.out.replace("\n", " ")
    assert series(tmp_path, **MANY).run() == 0
    assert len(taken) == 6, "the same decision from what is on record"
    assert capsys.readouterr().out == told.out


def test_a_plan_without_a_verdict_runs_to_its_end_and_counts_all_looks(light, tmp_path, capsys):
    _, taken = light  # all runs have the same four answers, which is too few for any verdict
    assert series(tmp_path, **MANY).run() == 0
    assert len(taken) == 10
    told = capsys.readouterr()
    assert "ended by its rule" not in told.err
    assert "1 contrast at 3 looks" in told.out.replace("\n", " ")


def test_later_seeds_and_a_missing_run_change_no_decision(light, tmp_path, capsys):
    """A look waits for all runs of its seeds, and uses no others."""
    outcomes, taken = light
    clear(outcomes, range(5))
    outcomes["noisy-1"] = "failed"
    assert series(tmp_path, **MANY).run() == 1
    assert len(taken) == 10, "no look was possible, at 3, 4 or 5 seeds"
    clear(outcomes, [1])
    del taken[:]
    plan = series(tmp_path, **MANY)
    assert plan.run() == 0
    assert taken == ["noisy-1"]
    capsys.readouterr()
    assert plan.decided() == 3
    assert {run for score in plan.compared(3).scores for run in score.seeds} == {0, 1, 2}


def test_ctrl_c_ends_the_plan(light, tmp_path):
    outcomes, taken = light
    outcomes["noisy-0"] = Stopped("stopped by SIGTERM", 15)
    with pytest.raises(Stopped):
        series(tmp_path).run()
    assert taken == ["control-0", "noisy-0"]


@pytest.mark.parametrize(("noisy", "run"), [([1, 1, 1, 0], True), ([1, 1, 0, 0], False), ([0, 0, 0, 0], False)])
def test_two_epochs_only_where_one_shows_promise(light, tmp_path, capsys, noisy, run):
    outcomes, taken = light
    outcomes["noisy-0"] = noisy  # the control has two of four
    arms = {**ARMS, "long": {"recipe": "e12_2ep", "when": {"arm": "noisy", "above": "control"}}}
    factors = ["aqn.noise", "trainer.total_epochs", "trainer.total_training_steps"]
    series(tmp_path, arms=arms, seeds=[0], factors=factors).run()
    assert ("long-0" in taken) == run
    assert (" is not above control (50.0 %)" in capsys.readouterr().err) != run


def test_a_condition_is_decided_by_seeds_that_both_arms_finished(light, tmp_path, capsys):
    """A seed that only one arm finished says nothing about arms: here a hard one would lower the control alone."""
    outcomes, taken = light
    outcomes |= {"control-0": [1, 1, 1, 0], "control-1": [0, 0, 0, 0], "noisy-0": [1, 1, 0, 0], "noisy-1": "failed"}
    arms = {**ARMS, "long": {"recipe": "e12_2ep", "when": {"arm": "noisy", "above": "control"}}}
    factors = ["aqn.noise", "trainer.total_epochs", "trainer.total_training_steps"]
    series(tmp_path, arms=arms, seeds=[0, 1], factors=factors).run()
    assert "long-0" not in taken
    assert "noisy (50.0 %) is not above control (75.0 %)" in capsys.readouterr().err


@pytest.mark.parametrize("name", plan_names())
def test_the_shipped_plans_can_run(light, tmp_path, name):
    path = find_recipe(name)
    plan = Series(read_plan(path, ["profile=cpu", f"aqn.run.dir={tmp_path / 'out'}"]), path)
    assert not plan.done
    assert all(len(pair) == 2 for pair in plan.plan.pairs)


def test_arms_that_differ_in_more_than_the_factor_are_refused_before_the_first_run(light, tmp_path):
    _, taken = light
    arms = {**ARMS, "fast": {"recipe": "e6a", "overrides": ["actor_rollout_ref.actor.optim.lr=1e-3"]}}
    with pytest.raises(ConfigError, match=r"fast and control differ outside of factors \(aqn\.noise\): .*optim\.lr"):
        series(tmp_path, arms=arms)
    with pytest.raises(ConfigError, match="are identical"):
        series(tmp_path, arms={**ARMS, "again": {"recipe": "e6a"}})
    assert not taken


@pytest.mark.parametrize("bad", ["aqn.noise.sgima_end=0", "aqn.noise.sigma_end=1"])
def test_a_wrong_override_is_told_with_its_arm_before_anything_is_prepared(light, tmp_path, monkeypatch, bad):
    monkeypatch.setattr(plans, "resolve", lambda *_, **__: pytest.fail("an arm was prepared"))
    with pytest.raises(ConfigError, match=r"^plan\.yaml: arms\.b: .*sigma_end"):
        series(tmp_path, arms={**ARMS, "b": {"recipe": "e12", "overrides": [bad]}})


def test_what_an_arm_s_data_do_not_allow_is_told_with_the_arm(light, tmp_path, monkeypatch):
    def resolve(config, fit):
        raise ConfigError("data.train_batch_size=9 is not a multiple")

    monkeypatch.setattr(plans, "resolve", resolve)
    with pytest.raises(ConfigError, match=r"^plan\.yaml: arms\.control: data\.train_batch_size=9"):
        series(tmp_path)


def test_runs_of_other_versions_are_not_mixed_in(light, tmp_path):
    series(tmp_path).run()
    for file in tmp_path.glob("out/*/runs/*/versions.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "elsewhere"}))
    with pytest.raises(ConfigError, match=r"made with different versions \(versions\.commit\).*aqn\.run\.dir"):
        series(tmp_path)


def test_versions_that_change_under_a_plan_stop_it_before_the_next_run(light, tmp_path, monkeypatch):
    _, taken = light
    execute = plans.execute

    def commit_after(prepared, base, console, ahead):
        made = execute(prepared, base, console, ahead)
        monkeypatch.setattr(train, "provenance", lambda files, base: provenance(files, base) | {"commit": "new"})
        return made

    monkeypatch.setattr(plans, "execute", commit_after)
    with pytest.raises(ConfigError, match=r"^versions\.commit changed since the plan began.*aqn\.run\.dir"):
        series(tmp_path).run()
    assert taken == ["control-0"]


def test_versions_that_change_within_a_run_stop_the_plan(light, tmp_path, monkeypatch):
    """A run that was restarted by itself (aqn.run.restarts) may have gone on with other code."""
    execute = plans.execute

    def restarted(prepared, base, console, ahead):
        run, outcome = execute(prepared, base, console, ahead)
        run.append("events.jsonl", {"kind": "attempt", "versions": {"commit": "new"}})
        return run, outcome

    monkeypatch.setattr(plans, "execute", restarted)
    with pytest.raises(ConfigError, match=r"control-seed0.* was made with different versions \(.*versions\.commit"):
        series(tmp_path).run()


def test_what_was_begun_with_other_versions_begins_anew(light, tmp_path, capsys):
    outcomes, taken = light
    outcomes["control-0"] = "failed"
    series(tmp_path, seeds=[0]).run()
    for file in tmp_path.glob("out/control*/runs/*/versions.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "elsewhere"}))
    del taken[:], outcomes["control-0"]
    assert series(tmp_path, seeds=[0]).run() == 0
    assert "versions changed since this run began (versions.commit): starting it again" in capsys.readouterr().err
    assert taken == ["control-0"]
    assert len(list(tmp_path.glob("out/control-seed0/runs/*/state.json"))) == 2


def test_arms_of_different_data_go_on_where_they_stopped(light, tmp_path):
    _, taken = light
    arms = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (data := tmp_path / name / "train.parquet").write_text(name)
        arms[name] = {"recipe": "e6a", "overrides": [f"data.train_files={data}"]}
    for _ in range(2):
        assert series(tmp_path, arms=arms, seeds=[0], factors=["data.train_files"]).run() == 0
    assert taken == ["a-0", "b-0"]


def test_a_machine_short_of_something_ends_one_run_only(light, tmp_path, capsys):
    outcomes, taken = light
    outcomes["control-0"] = EnvironmentFault("11 GB of memory are missing")
    assert series(tmp_path, seeds=[0]).run() == 1
    assert taken == ["control-0", "noisy-0"]
    assert "11 GB of memory are missing" in capsys.readouterr().err


def test_equal_arms_are_refused_although_no_contrast_holds_them_together(light, tmp_path):
    twins = {name: {"recipe": "e12"} for name in ("b", "c")}
    with pytest.raises(ConfigError, match="the arms b and c are identical"):
        series(tmp_path, arms={"a": {"recipe": "e6a"}, **twins}, contrasts=[["b", "a"], ["c", "a"]])


def test_preview_tells_what_is_on_record(light, tmp_path, capsys):
    series(tmp_path, seeds=[0]).run()
    capsys.readouterr()
    assert series(tmp_path).preview() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "e6a" in line or "e12" in line]
    assert [row[-5:] for row in rows] == [["done", "│", "to", "run", "│"]] * 2


@pytest.mark.parametrize("name", plan_names())
@pytest.mark.parametrize("profile", ["cpu", "cuda", "npu"])
def test_shipped_plans_compare_what_differs_in_their_factors_only(light, tmp_path, name, profile):
    path = find_recipe(name)
    plan = read_plan(path, [f"profile={profile}", f"aqn.run.dir={tmp_path / 'out'}"])
    assert Series(replace(plan, seeds=(0,)), path).plan.pairs


def test_what_workers_are_told_of_activations_is_no_difference_of_its_own():
    """The arms of the plan `w4a8` as they are prepared: with the rounding and the folder that the sides are told."""
    plan = read_plan(find_recipe("w4a8"), ["profile=cpu"])
    settings = []
    for name, arm in plan.arms.items():
        config = load_recipe(arm.recipe, [*plan.overrides, *arm.overrides])
        tell_workers(config)
        if name == "w4a16":  # as `prepare_serving` does
            OmegaConf.update(config, "actor_rollout_ref.model.override_config.served_path", "/bf16", force_add=True)
        settings.append(settings_of(OmegaConf.to_container(config, resolve=True)))
    told = [{key for key in one if key.endswith(("mxfp4_activation", "served_path"))} for one in settings]
    assert [len(keys) for keys in told] == [2, 3, 3]  # the critic's config has a copy of the actor's
    assert beyond(plan.factors, settings) == ""
    assert "mxfp4_activation" in beyond(["aqn.noise"], settings)
