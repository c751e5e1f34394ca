"""Check that the quick loop leaves out what tests/slow.txt names, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

from tests.conftest import SLOW, pytest_ignore_collect

TESTS = Path(__file__).resolve().parents[1]


def test_every_slow_file_is_there():
    assert {path.name for path in TESTS.rglob("test_*.py")} >= SLOW


def test_a_slow_file_is_left_out_in_the_quick_loop_alone():
    slow, quick = TESTS / "unit" / min(SLOW), Path(__file__)
    for option, path, ignored in ((True, slow, True), (True, quick, None), (False, slow, None), (False, quick, None)):
        config = SimpleNamespace(getoption={"--quick": option}.get)
        assert pytest_ignore_collect(path, config) is ignored
