"""With many ranks and responses no record becomes large, and four times as much takes about four times as long."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_aqn.bench.many_ranks import Sizes, simulate
from verl_aqn.cli.main import app
from verl_aqn.runs.folder import RunFolder

pytest.importorskip("verl")  # the processes that build the base's record
SMALL, LARGE = Sizes(32, 2048, 8, 64, 8), Sizes(128, 8192, 8, 64, 8)
LIMIT = 1_000_000
TIMED_S = 0.1  # being faster is no error


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[dict, dict]:
    found = []
    for sizes in (SMALL, LARGE):
        folder = tmp_path_factory.mktemp("simulated")
        found.append({row.name.partition(" (")[0]: row for row in simulate(folder, sizes)} | {"folder": folder})
    return tuple(found)


def test_records_grow_no_faster_than_ranks_and_stay_small(rows):
    small, large = rows
    for name, one in large.items():
        if name == "folder" or not one.largest:
            continue
        assert one.largest < LIMIT / 4, name  # eight times as many ranks are 1,024
        assert one.bytes <= 4.2 * small[name].bytes, name
    base = large["base at the start"]
    assert base.bytes < 2 * small["base at the start"].bytes  # ranks with equal content only add to a count
    assert (base.largest, large["noise of step 1"].bytes) < (30_000, 30_000)


def test_ranks_of_one_replica_alone_send_their_tables(tmp_path, rows):
    names = [row.name for row in simulate(tmp_path / "run", Sizes(64, 256, 64, 64, 2))]
    assert "base at the start (1 of 1 replicas sent tables)" in names
    (run,) = rows[1]["folder"].glob("runs/runs/[!.]*")
    records = list(RunFolder(run).read("evidence.jsonl"))
    base = next(record for record in records if record["kind"] == "base")
    assert base["files"]["tensors"] == LARGE.matrices + 1  # each was read once, for all of the ranks' parts
    assert len(records) == 5 + 2 * 3 + 3  # one for all ranks, at the start, in each of two steps and at the end
    assert max(len(json.dumps(record)) for record in records) < LIMIT / 2


def test_four_times_as_much_does_not_take_sixteen_times_as_long(rows):
    small, large = rows
    timed = [name for name, one in large.items() if name != "folder" and one.seconds > TIMED_S]
    for name in timed:
        if not name.startswith("scored"):  # of one size in both
            assert large[name].seconds < 10 * small[name].seconds + 3 * TIMED_S, name


def test_the_command_of_the_page_is_there():
    page = (Path(__file__).parents[3] / "docs" / "scale.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("verl-aqn ")]
    words = line.removeprefix("verl-aqn ").split()
    small = [{"1024": "16", "131072": "64"}.get(word, word) for word in words]
    result = CliRunner().invoke(app, [*small, "--matrices", "16", "--layers", "2", "--json"])
    assert result.exit_code == 0, result.output
    names = {row["name"].partition(" (")[0] for row in json.loads(result.stdout)}
    assert {"base at the start", "noise of step 2", "samples of step 1", "report"} <= names


def test_no_text_holds_the_scorer_up(rows):
    scored = {name: one.seconds for name, one in rows[0].items() if name.startswith("scored")}
    assert len(scored) == 9
    assert max(scored.values()) < 5, scored  # of 1 MB; quadratic ones took minutes
