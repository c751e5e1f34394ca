"""Simulation of what a run of many ranks and responses records and looks up, with the code that a run uses.

There is no engine and no cluster: the ranks' reports are made up, from a folder of small random matrices and the norms
of a small model. Everything after that (comparing, grouping, writing, judging, reading, the report) is the code of a
real run.
"""

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from safetensors.torch import save_file

from verl_aqn.checkpoints.disk_base import DiskBase, Part
from verl_aqn.checkpoints.packing import combined_digest
from verl_aqn.checkpoints.slices import NOTHING
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.noise_settings import order_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import EvidenceError
from verl_aqn.noise import NoiseInjector
from verl_aqn.runs.folder import EVIDENCE, open_run
from verl_aqn.runs.judge.ranks import grouped, grouped_base
from verl_aqn.runs.judge.records import END, VALIDATION, VERSION, Judge
from verl_aqn.runs.report.page import write_report
from verl_aqn.runs.request_seeds import StepPrompts, digest_of, last_outputs, order_of_key
from verl_aqn.runs.samples import FILE, sample_records, samples_of
from verl_aqn.runs.stats.scores import answers_in
from verl_aqn.tasks.gsm8k import compute_score

STEPS = 2  # σ 0, then σ_start
SAMPLES = 8  # responses per prompt
HIDDEN = 64
HOSTILE = {
    "commas": ",",
    "digits and commas": "1,",
    "digits": "1",
    "groups of three": "1,000,",
    "marks": "#### ",
    "signs and currencies": "-$",
    "brackets": "(((",
    "spaces": "1 ",
    "fractions": "1/2 ",
}
"""Pieces that a response repeats to slow the scorer down."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run. `ways`: ranks of one replica of the rollout, each with a different part of the base."""

    ranks: int = 1024
    answers: int = 131_072
    ways: int = 8
    matrices: int = 1024
    layers: int = 64


@dataclass
class Row:
    """The cost of one operation: CPU seconds, bytes in all, and bytes of the largest record."""

    name: str
    seconds: float
    bytes: int = 0
    largest: int = 0


class Simulation:
    """One run under the empty `folder`. `rows`: the measurements, in order."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.rows: list[Row] = []
        self.model = folder / "model"
        _write_base(self.model, sizes.matrices)
        self.config = load_recipe(
            "e12_aggressive_1ep", ["profile=cpu", f"trainer.total_training_steps={STEPS}", "aqn.noise.num_stages=2"]
        )
        self.schedule = schedule_of(self.config, STEPS)
        self.noise = parse_aqn(self.config).noise
        self.judge = Judge(lambda step: order_of(self.noise, self.schedule, step), stage_at=self.schedule.stage)
        self.run = open_run(folder / "runs", {"of": "simulation"})
        self.run.write_text("config.yaml", yaml.safe_dump(_plain(self.config)))
        table = [{"step": n, "stage": self.schedule.stage(n), "sigma": self.schedule.sigma(n)} for n in range(STEPS)]
        self.run.write_text("schedule.json", json.dumps(table))
        self.injector = NoiseInjector(_norms(sizes.layers))

    @contextmanager
    def measured(self, name: str, file: str = "") -> Iterator[None]:
        """Measure the CPU time of the block and, with `file`, the bytes that it wrote to this file."""
        path = self.run.path / file
        before = path.stat().st_size if file and path.exists() else 0
        gc.collect()
        gc.disable()  # a collection would add its time to a random row
        began = time.process_time()
        try:
            yield
        finally:
            row = Row(name, time.process_time() - began)
            gc.enable()
        if file:
            with path.open("rb") as lines:
                lines.seek(before)
                found = [len(line) for line in lines]
            row.bytes, row.largest = sum(found), max(found, default=0)
        self.rows.append(row)

    def record(self, kind: str, *records: dict[str, Any]) -> None:
        """Record evidence and then judge it, as the trainer does."""
        self.run.add_evidence(*({"kind": kind, **record} for record in records))
        for record in records:
            if fault := self.judge.add({"kind": kind, **record}):
                raise EvidenceError(fault)

    def of_ranks(self, kind: str, evidence: dict[str, Any], **more: Any) -> None:
        """Record the same evidence for every rank of the rollout."""
        self.record(kind, *({**more, **one} for one in grouped([dict(evidence) for _ in range(self.sizes.ranks)])))

    def simulate(self) -> list[Row]:
        """Simulate a run from its start to its report."""
        gc.collect()
        gc.freeze()  # so that the collection before each measurement does not visit everything from before again
        try:
            self.measure()
        finally:
            gc.unfreeze()
        return self.rows

    def measure(self) -> None:
        """Take all measurements in order."""
        self.begin()
        for step in range(1, STEPS + 1):
            self.step(step)
        self.validate(STEPS)
        self.end()
        self.look_up()
        self.read()
        self.score()

    def begin(self) -> None:
        """Record everything that a run records before generation."""
        ranks = self.sizes.ranks
        nodes = [f"10.0.{rank // 2048}.{rank // 8 % 256}" for rank in range(ranks)]
        with self.measured("start: places, norms", EVIDENCE):
            self.record("placed", {"evidence": VERSION, "actor_nodes": nodes, "rollout_nodes": nodes})
            self.record("layout", {"layout": "shared prompts"})
            order = order_of(self.noise, self.schedule, 0)
            told = self.injector.describe(order) | {"vllm": "simulated", "dtype": "torch.bfloat16"}
            self.of_ranks("rollout", told, rank_count=ranks, expected_norms=self.injector.names)
        self.base("start")
        self.adapter(0)

    def base(self, when: str) -> None:
        """Compare the base of every rank with the folder."""
        from verl_aqn.integrations.verl.base_evidence import BaseRecords, with_tables

        if when == "start":
            self.made = BaseRecords(self.model, "packed", "none", lambda _: None)
            self.answers, self.actor = _answers(DiskBase(self.model), self.sizes.ways), _actor(DiskBase(self.model))
        sent_tables: list[int] = []
        replicas = self.sizes.ranks // self.sizes.ways
        told = [[answer for answer, _ in self.answers]] * replicas

        def tables_of(replica: int) -> list[dict[str, Any]]:
            sent_tables.append(replica)
            return [tables for _, tables in self.answers]

        with self.measured(f"base at the {when}", EVIDENCE):
            actual = with_tables(told, tables_of)
            counts = {"actor": self.sizes.ranks, "rollout": self.sizes.ranks}
            record = self.made.record(when, [self.actor] * self.sizes.ranks, actual, counts)
            self.record("base", grouped_base(record))
        self.rows[-1].name += f" ({len(sent_tables)} of {replicas} replicas sent tables)"

    def adapter(self, step: int) -> None:
        """Record which adapter every rank has."""
        ways = [f"{step * 1000 + way:064x}" for way in range(self.sizes.ways)]
        with self.measured(f"adapter after step {step}", EVIDENCE):
            actual = [
                {
                    "expected": ways[rank % len(ways)],
                    "modules": 448,
                    "adapter_digest": ways[rank % len(ways)],
                    "b_max": 0.5,
                }
                for rank in range(self.sizes.ranks)
            ]
            self.record(
                "adapter", {"step": step, "whole": False, "sent": "a" * 64, "bytes": 1, "actual": grouped(actual)}
            )

    def step(self, step: int) -> None:
        """Record noise, samples, mismatch and sync of a step."""
        order = order_of(self.noise, self.schedule, step - 1)
        with torch.no_grad():
            evidence = self.injector.apply(order)
        with self.measured(f"noise of step {step}", EVIDENCE):
            self.of_ranks("noise", evidence, stage=self.schedule.stage(step - 1))
        with self.measured(f"samples of step {step}", FILE):
            digest, answers = digest_of({key: [7, 8, 9] for key in self.keys(step)})
            self.run.append(FILE, *sample_records(step, digest, answers))
        self.record("mismatch", {"step": step, "source": None, "reason": "simulated"})
        self.adapter(step)
        metrics = {"aqn/sigma": order.sigma, "critic/score/mean": 0.5, "timing_s/step": 1.0}
        self.run.append("metrics.jsonl", {"kind": "step", "step": step, "total": STEPS, "metrics": metrics})

    def keys(self, step: int) -> list[str]:
        """Return verl's keys of a step's responses in the order of arrival."""
        prompts, count = StepPrompts(), self.sizes.answers // SAMPLES
        uids = [prompts.name(step, row)[1] for row in range(count)]
        return [f"{uid}_{sample}_0" for sample in range(SAMPLES) for uid in uids]

    def clean(self, when: str, at: int) -> None:
        """Record clean norms in every rank."""
        with torch.no_grad():
            evidence = self.injector.restore()
        self.of_ranks("clean", evidence, when=when, at=at)

    def validate(self, step: int) -> None:
        """Write every response of a validation as verl does."""
        self.clean(VALIDATION, step)
        file = f"validation/{step}.jsonl"
        (self.run.path / "validation").mkdir()
        items = self.sizes.answers // SAMPLES
        with self.measured("validation, written", file), (self.run.path / file).open("w") as lines:
            for item in range(items):
                for sample in range(SAMPLES):
                    right = float((item + sample) % 3 == 0)
                    line = {"input": f"{'How many clips are there? ' * 16}{item}", "output": "So there are. " * 20,
                            "gts": str(item), "score": right, "step": step, "acc": right, "item": item,
                            "sample": sample}  # fmt: skip
                    lines.write(json.dumps(line) + "\n")
        sizes = {"items": items, "samples": SAMPLES, "accuracy": 1 / 3, "answered": items * SAMPLES, "failed": 0}
        self.run.append("metrics.jsonl", {"kind": "validation", "step": step, **sizes})

    def end(self) -> None:
        """Read norms and base for the last time."""
        self.clean(END, STEPS)
        self.base("end")
        self.run.set_status("finished")

    def look_up(self) -> None:
        """Measure what a step looks up by the keys of its responses."""
        from verl_aqn.integrations.verl.token_mismatch import align, scored_again

        keys = self.keys(1)
        with self.measured("responses sorted"):
            ordered = sorted(keys, key=order_of_key)
        with self.measured("responses by session"):
            last_outputs(keys)
        rescored = scored_again(ordered, 16)
        clean_logp = {key: [0.0] * 8 for key in rescored}
        mask = torch.ones(len(ordered), 8, dtype=torch.bool)
        with self.measured(f"{len(rescored):,} rescored responses found among the step's"):
            align(ordered, clean_logp, mask)
        prompts = StepPrompts()
        with self.measured(f"{self.sizes.answers:,} prompts of one step named"):
            for row in range(self.sizes.answers):
                prompts.name(1, row % (self.sizes.answers // 2))

    def read(self) -> None:
        """Measure what reads the records after the run."""
        from verl_aqn.runs.evidence import judge_run

        with self.measured("samples, read"):
            samples_of(self.run)
        with self.measured("validation, read"):
            answers_in(self.run.read(f"validation/{STEPS}.jsonl"), record={"samples": SAMPLES})
        with self.measured("evidence, judged again"):
            if faults := judge_run(self.run).faults:
                raise EvidenceError(f"the simulated run has a fault: {faults[0]}")
        page = self.run.path / "report.html"
        with self.measured("report"):
            write_report([self.run.path], page)
        self.rows[-1].bytes = page.stat().st_size

    def score(self) -> None:
        """Measure the scorer on texts of 1 MB that are made to slow it down."""
        for name, text in HOSTILE.items():
            with self.measured(f"scored: 1 MB of {name}"):
                compute_score("", f"#### {text * (1_000_000 // len(text))}", "72")


def table(rows: list[Row]) -> Table:
    """Return the measurements as a table."""
    view = Table(title="Records and look-ups", title_justify="left")
    for column in ("what", "CPU s", "kB", "largest record, kB"):
        view.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        sizes = (f"{size / 1e3:,.1f}" if size else "–" for size in (row.bytes, row.largest))
        view.add_row(row.name, f"{row.seconds:.3f}", *sizes)
    return view


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    keys = ("aqn", "trainer", "data", "algorithm")
    return {key: OmegaConf.to_container(config[key], resolve=key == "aqn") for key in keys}


def _norms(layers: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=layers, **sizes))


def _write_base(folder: Path, matrices: int) -> None:
    """Write a packed folder of small random matrices: half attention, half experts."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"format": "mxfp4-pack-quantized"}}))
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    for number in range(matrices):
        name = _attention(number) if number % 2 else _expert(number)
        tensors[f"{name}.weight_packed"] = torch.randint(256, (64, HIDDEN // 2), generator=random, dtype=torch.uint8)
        tensors[f"{name}.weight_scale"] = torch.full((64, HIDDEN // 32), 127, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _attention(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj"


def _expert(number: int) -> str:
    return f"model.layers.0.mlp.experts.{number // 2}.up_proj"


def _answers(disk: DiskBase, ways: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (report, tables) of each rank of a replica: rows of attention, and its own experts."""
    from verl_aqn.integrations.verl.base_evidence import table_digest

    parts: list[dict[str, Part]] = []
    for way in range(ways):
        mine: dict[str, Part] = {}
        for number, name in enumerate(disk.groups):
            if disk.groups[name] != "packed":
                mine[name] = Part(disk.dtypes[name])
            elif "experts" not in name:
                mine[name] = Part("packed", (way * 64 // ways, 64 // ways, 0, HIDDEN) if ways > 1 else None)
            elif number % ways == way:
                mine[name] = Part("packed")
        parts.append(mine)
    wanted = {name: {mine[name] for mine in parts if name in mine} for name in disk.groups}
    digests, _ = disk.digests(wanted)
    answers = []
    for mine in parts:
        tensors: dict[str, list[Any]] = {
            name: [digests[name, part], part.form, part.form != "packed", list(part.slice) if part.slice else None]
            for name, part in mine.items()
        }
        slices = {name: tensors[name][3] if name in mine else NOTHING for name in disk.groups}
        packed = [(name, tensors[name][0]) for name in mine if disk.groups[name] == "packed"]
        tables = {"tensors": tensors, "computed": {}, "lost": {}, "slices": {n: s for n, s in slices.items() if s}}
        told = {
            "layers": len(packed), "experts": 0, "form": "packed", "base_digest": combined_digest(packed),
            "weights_digest": "a" * 64, "weights_equal_base": None, "activations": ["none"], "kernel": "Simulated",
            "kernel_digest": None, "told": table_digest(tables),
        }  # fmt: skip
        answers.append((told, tables))
    return answers


def _actor(disk: DiskBase) -> dict[str, Any]:
    forms = {name: "packed" if group == "packed" else disk.dtypes[name] for name, group in disk.groups.items()}
    digests, _ = disk.digests({name: [Part(form)] for name, form in forms.items()})
    tensors = {name: (digests[name, Part(form)], form) for name, form in forms.items()}
    packed = combined_digest((name, tensors[name][0]) for name, form in forms.items() if form == "packed")
    return {
        "tensors": tensors, "converted": {}, "passed": [], "faults": [], "digest": "d" * 64, "packed_digest": packed,
        "activations": ["none"],
    }  # fmt: skip


def simulate(folder: Path, sizes: Sizes) -> list[Row]:
    """Simulate a run of these sizes in the empty `folder`.

    Raises EvidenceError if the judge finds a fault.
    """
    return Simulation(folder, sizes).simulate()
