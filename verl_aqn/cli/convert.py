"""`verl-aqn convert`."""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from verl_aqn.errors import ConfigError

if TYPE_CHECKING:
    from verl_aqn.config.convert.recipe import Conversion

_WORDS = {
    "kept": "kept", "renamed": "renamed", "ours": "ours", "default": "verl's default",
    "refused": "refused", "unknown": "not expanded",
}  # fmt: skip


def convert(
    source: Annotated[
        list[str],
        typer.Argument(
            help="A shell script with its arguments, a resolved config (.yaml), or the words of a command after --."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The recipe to write; a new file. By default it is printed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Convert a launch of verl's main_ppo to a recipe. The script is read, never run."""
    from verl_aqn.config.convert.recipe import convert as converted

    if output is not None and output.suffix != ".yaml":
        raise ConfigError(f"-o {output}: the name of a recipe must end in .yaml")
    made = converted(source)
    if output is not None:
        _write(output, made.recipe())
    if as_json:
        print(json.dumps(made.to_dict() | {"recipe": made.recipe(), "output": output and str(output)}))
        return
    if output is None:
        print(made.recipe(), end="")
    view = Table(title=escape(f"{made.source}: {_counts(made)}"), title_justify="left")
    for column in ("line", "setting", "value", "result"):
        view.add_column(column, justify="right" if column == "line" else "left", overflow="fold")
    for status, word in _WORDS.items():
        for one in made.having(status):
            became = f"{word} to {one.to}" if status == "renamed" else word
            became += f": {one.why}" if one.why else ""
            value = json.dumps(one.value, ensure_ascii=False)
            view.add_row(str(one.line or ""), one.key, escape(value), escape(became))
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200, highlight=False)
    console.print(view)
    for note in made.notes:
        console.print(f"note: {note}", markup=False)
    if output is not None:
        console.print(f"next: verl-aqn train {shlex.quote(str(output))} --dry-run", markup=False)


def _counts(made: "Conversion") -> str:
    counts = ((len(made.having(status)), word) for status, word in _WORDS.items())
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def _write(output: Path, text: str) -> None:
    """Write a new file, completely or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=output.parent, encoding="utf-8", delete=False) as file:
            file.write(text)
        try:
            os.chmod(file.name, 0o644)
            os.link(file.name, output)  # fails if the file exists, so nothing is overwritten
        finally:
            os.unlink(file.name)
    except FileExistsError as error:
        raise ConfigError(f"{output} exists already: choose another -o, or remove it") from error
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}: choose another -o") from error
