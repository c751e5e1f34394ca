"""Plans: arms × seeds of an experiment, run one after another, each run once, and compared at the end.

A plan is a YAML file (`verl_aqn.launch.plan`). The whole plan is checked before its first run. Finished runs are not
repeated; runs that died are resumed.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import AqnError, ConfigError, DataError
from verl_aqn.launch.console import Console
from verl_aqn.launch.plan import Plan
from verl_aqn.launch.train import compose, execute, identity, ready, resolve, versions_now
from verl_aqn.runs.folder import RunFolder, runs_of
from verl_aqn.runs.stats.arms import arms, beyond, settings_of, versions_of
from verl_aqn.runs.stats.compare import UNKNOWN, Report, compare
from verl_aqn.runs.stats.intervals import validation_text
from verl_aqn.safe_files import own_folder
from verl_aqn.terminal import print_wide

_BACK = "restore the old versions, or start the plan anew with aqn.run.dir=DIR"


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the keys in which versions differ, "" for none."""
    return beyond([], [settings_of({"versions": one}) for one in (before, now)])


@contextmanager
def _faults_of(file: Path, arm: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file.name}: arms.{arm}: {error}") from error


class Series:
    """The runs of a plan. `base`: the folder that contains one folder for each run."""

    def __init__(self, plan: Plan, file: Path, console: Console | None = None) -> None:
        """Check the whole plan: recipe, model and data of each arm, how arms differ, and what is recorded.

        All recipes are composed before the first model is prepared. `file`: the plan's file, which names the folder and
        error messages. Raises ConfigError and what `verl_aqn.launch.train.resolve` raises.
        """
        self.plan, self.console = plan, console or Console()
        self.done: dict[tuple[str, int], RunFolder] = {}
        self.outdated: dict[tuple[str, int], str] = {}  # unfinished runs → versions that changed since they began
        self.minutes: list[float] = []
        self.verdicts: dict[int, bool] = {}  # number of seeds at a look → whether every contrast has a verdict
        composed, self.configs = {}, {}
        for arm in plan.arms:
            with _faults_of(file, arm):
                composed[arm] = compose(plan.arms[arm].recipe, self.overrides(arm, plan.seeds[0]))
        for arm, config in composed.items():
            with _faults_of(file, arm):
                self.configs[arm] = resolve(config, fit=False).config  # without the search for σ_start
        first = next(iter(self.configs.values()))
        self.base = Path(parse_aqn(first).run.dir or f"/tmp/mxfp4_plan_{file.stem}").expanduser()
        own_folder(self.base, make=False)
        settings = {arm: settings_of(identity(config)) for arm, config in self.configs.items()}
        for one, other in combinations(settings, 2):
            if settings[one] == settings[other]:
                raise ConfigError(f"the arms {one} and {other} are identical: remove one")
        for arm, control in plan.pairs:
            if others := beyond(plan.factors, [settings[control], settings[arm]]):
                raise ConfigError(
                    f"{arm} and {control} differ outside of factors ({', '.join(plan.factors)}): {others}"
                )
        self.versions = {arm: versions_now(config) for arm, config in self.configs.items()}
        self.look()

    def identity(self, arm: str, seed: int) -> dict:
        """Return the configuration that identifies the run of an arm and a seed."""
        config = self.configs[arm].copy()
        config.aqn.seed = seed
        if parse_aqn(config).noise.target_kl is not None:
            config = resolve(config).config
        return identity(config)

    def overrides(self, arm: str, seed: int) -> list[str]:
        own = [f"aqn.seed={seed}", f"trainer.experiment_name={arm}"]
        return [*self.plan.overrides, *self.plan.arms[arm].overrides, *own]

    def folder(self, arm: str, seed: int) -> Path:
        """Return the folder with all attempts at a run."""
        return self.base / f"{arm}-seed{seed}"

    def look(self) -> None:
        """Find the finished runs.

        Raises ConfigError if they were made with other versions, because they could not be compared.
        """
        for arm, seed in (*self.plan.runs(False), *self.plan.runs(True)):
            self.look_at(arm, seed)

    def look_at(self, arm: str, seed: int) -> bool:
        """Return whether this run is finished: another process may work on the same plan.

        Raises what `look` raises.
        """
        if (arm, seed) in self.done or not (self.folder(arm, seed) / "runs").is_dir():
            return (arm, seed) in self.done
        runs = runs_of(self.folder(arm, seed), self.identity(arm, seed))
        finished = [run for run in runs if run.state["status"] == "finished"]
        if not runs:
            return False
        if finished:
            self.finish(arm, seed, finished[-1])
        elif others := _changed(versions_of(runs[-1].path), self.versions[arm]):
            self.outdated[arm, seed] = others
        return bool(finished)

    def finish(self, arm: str, seed: int, run: RunFolder) -> None:
        """Take a finished run for this arm and seed. Raises ConfigError if an attempt at it had other versions."""
        if others := _changed(versions_of(run.path), self.versions[arm]):
            raise ConfigError(f"{run.path} was made with different versions ({others}) and cannot be compared: {_BACK}")
        self.done[arm, seed] = run

    def run(self) -> int:
        """Run everything that is not finished, then compare. Return exit code 0 if all runs finished."""
        failed = []
        if self.plan.early:
            self.console.say(f"plan     {self.rule}")
        for conditional in (False, True):
            if conditional:
                self.look()  # conditions depend on all finished runs
            for arm, seed in self.plan.runs(conditional):
                if self.decided():
                    break
                if self.look_at(arm, seed):
                    self.console.say(f"plan     {arm}, seed {seed}: finished before, {self.result(arm, seed)}")
                elif conditional and (reason := self.unpromising(arm)):
                    self.console.say(f"plan     {arm}, seed {seed}: not run, {reason}")
                elif not self.run_one(arm, seed):
                    failed.append((arm, seed))
        failed = [one for one in failed if not self.look_at(*one)]
        for arm, seed in failed:
            self.console.warn(f"{arm}, seed {seed} did not finish; run the same command to try again")
        self.show()
        return 1 if failed else 0

    def run_one(self, arm: str, seed: int) -> bool:
        """Run one arm and seed from the start or the last checkpoint. Return whether the run finished."""
        if others := _changed(self.versions[arm], versions_now(self.configs[arm])):
            raise ConfigError(f"{others} changed since the plan began, so that runs cannot be compared: {_BACK}")
        conditional = self.plan.arms[arm].when is not None
        left = [one for one in self.plan.runs(conditional) if one not in self.done]
        about = f", about {len(left) * sum(self.minutes) / len(self.minutes):.0f} minutes left" if self.minutes else ""
        self.console.say(f"plan     {arm}, seed {seed}: {len(self.done)} runs finished, {len(left)} to go{about}")
        overrides = self.overrides(arm, seed)
        if others := self.outdated.pop((arm, seed), ""):
            self.console.say(f"plan     versions changed since this run began ({others}): starting it again")
            overrides.append("aqn.run.fresh=true")
        began = time.monotonic()
        try:
            with ready(compose(self.plan.arms[arm].recipe, overrides)) as (prepared, ahead):
                run, outcome = execute(prepared, self.folder(arm, seed), self.console, ahead)
        except AqnError as error:
            self.console.warn(str(error))
            return False
        if outcome.status != "finished":
            self.console.warn(f"{outcome.message} (log: {run.log})")
            return False
        self.finish(arm, seed, run)
        self.minutes.append((time.monotonic() - began) / 60)
        return True

    def unpromising(self, arm: str) -> str:
        """Return why an arm with a condition is not run; "" if it is run.

        The condition compares mean accuracies, fractions of 1, over the seeds that both arms finished: seeds differ
        more than arms do.
        """
        when = self.plan.arms[arm].when
        assert when is not None
        seeds = [seed for seed in self.plan.seeds if {(when.arm, seed), (when.above, seed)} <= self.done.keys()]
        if not seeds:
            return f"{when.arm} and {when.above} finished no seed in common"
        reached, bar = (
            sum(self.last(self.done[name, seed])["accuracy"] for seed in seeds) / len(seeds)
            for name in (when.arm, when.above)
        )
        if reached > bar:
            return ""
        return f"{when.arm} ({100 * reached:.1f} %) is not above {when.above} ({100 * bar:.1f} %)"

    def last(self, run: RunFolder) -> dict:
        """Return the last validation of a run."""
        found = run.by_step("metrics.jsonl", "validation")
        if not found:
            raise DataError(f"{run.path} has no validation: a plan cannot use it")
        return found[max(found)]

    def result(self, arm: str, seed: int) -> str:
        return validation_text(self.last(self.done[arm, seed]))

    @property
    def rule(self) -> str:
        """The rule by which a plan with `looks` ends, in words."""
        early = ", ".join(map(str, self.plan.early))
        return (
            f"ends after {early} seeds if then every contrast has a verdict, else after {len(self.plan.seeds)}; "
            f"intervals are corrected for {len(self.plan.early) + 1} looks"
        )

    def decided(self) -> int:
        """Return the number of seeds after which the plan's rule ends it; 0 if it does not.

        Only runs of the first so many seeds count, so that an interrupted plan decides as one in a single go.
        """
        for count in self.plan.early:
            if any((arm, seed) not in self.done for seed in self.plan.seeds[:count] for arm in self.plan.arms):
                continue
            if count not in self.verdicts:
                report = self.compared(count)
                assert report is not None
                self.verdicts[count] = all(contrast.verdict != UNKNOWN for contrast in report.arms)
            if self.verdicts[count]:
                return count
        return 0

    def compared(self, count: int = 0) -> Report | None:
        """Return the comparison of the plan's contrasts over the finished runs; None if no pair has any.

        `count`: only the first so many seeds; 0: all.
        """
        seeds = self.plan.seeds[: count or None]
        done = {one: run for one, run in self.done.items() if one[1] in seeds}
        pairs = [pair for pair in self.plan.pairs if all(any(name == arm for name, _ in done) for arm in pair)]
        if not pairs:
            return None
        wanted = {arm for pair in pairs for arm in pair}
        order = [done[name, seed].path for name in self.plan.arms if name in wanted for seed in seeds
                 if (name, seed) in done]  # fmt: skip
        found = {arm.name: arm for arm in arms(order, self.plan.factors, any_difference=True)}
        looks = len(self.plan.early) + 1
        return compare(list(found.values()), [(found[arm], found[control]) for arm, control in pairs], looks)

    def show(self) -> None:
        """Print the comparison on standard output."""
        if stopped := self.decided():
            self.console.say(f"plan     ended by its rule after {stopped} seeds: every contrast has a verdict")
        report = self.compared(stopped)
        if report is None:
            self.console.say("plan     nothing to compare yet")
        else:
            self.console.report(report)
        self.console.say(f"plan     runs in {self.base}: `verl-aqn runs {self.base}`")

    def preview(self) -> int:
        """Print what is finished and what would be run: one row per arm, one column per seed."""
        view = Table(title=escape(f"Runs in {self.base}"), title_justify="left")
        for column in ("arm", "recipe", "only if", *(f"seed {seed}" for seed in self.plan.seeds)):
            view.add_column(column)
        for name, arm in self.plan.arms.items():
            cells = ("done" if (name, seed) in self.done else "to run" for seed in self.plan.seeds)
            condition = f"{arm.when.arm} above {arm.when.above}" if arm.when else ""
            view.add_row(name, escape(arm.recipe), condition, *cells)
        print_wide(view)
        if self.plan.early:
            print(f"The plan {self.rule}.")
        return 0
