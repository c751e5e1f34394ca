"""Command-line options for the whole test suite, and the environment that each test finds."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import hypothesis
import pytest

# Small tests run beside real ones with the lowest priority, so an example may wait for a core.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SLOW = frozenset(
    line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if line and not line.startswith("#")
)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the files that tests/slow.txt names")
    parser.addoption("--all-kills", action="store_true", help="test_faults.py: every process, every phase")
    parser.addoption("--all-memory", action="store_true", help="test_memory.py: every model with every batch")


def pytest_ignore_collect(collection_path, config):
    """Leave a slow file out without importing it, which takes longer than many tests."""
    return True if config.getoption("--quick") and collection_path.name in SLOW else None


PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Undo what a test, or a package that works in it, does to this process.

    torch's compiler sets an environment variable. A benchmark makes the process the parent of its orphans
    (`adopt_orphans`), after which no later test can start a process that is no descendant.
    """
    with patch.dict(os.environ):
        yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
