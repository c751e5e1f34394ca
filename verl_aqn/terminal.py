"""Printing for commands; light, so that `verl-aqn --help` is fast."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_wide(view: Table) -> None:
    """Print a table with long rows: in a file or a pipe, which have no width, it gets 200 columns."""
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(view)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on standard error and yield its callback; show nothing without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, module: bar.update(task, completed=done, total=total, description=f"{what} {module}")


@contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """Send what libraries print meanwhile to stderr, also from compiled code, so that stdout holds results only."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
