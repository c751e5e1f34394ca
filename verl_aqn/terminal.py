"""What commands print with; light, so that `verl-aqn --help` is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_wide(view: Table) -> None:
    """A table with long rows: a file or a pipe has no width of its own."""
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(view)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, as the callback that long work takes; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, module: bar.update(task, completed=done, total=total, description=f"{what} {module}")
