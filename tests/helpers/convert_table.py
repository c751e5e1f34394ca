"""Make the table of docs/convert.md, "Tried on verl's own scripts", from a clone of verl.

`python -m tests.helpers.convert_table CLONE` prints the rows that differ, and exits with 1 if there are any; `--write`
corrects the page. `CLONE` is a git directory of verl with the commits that the table names: the scripts are read with
`git show`, and none of them is in this repository. The last column (`--dry-run`) is not touched.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from verl_aqn.config.convert.recipe import STATUSES, Conversion, convert

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"
ENVIRONMENT = {
    "PWD": "/verl"
}  # the only variable that is set; a script that needs another one has settings not expanded
_ROW = re.compile(r"\| `([^`]+\.sh)` (\([^|]*\)) \| `(\w+)` \|((?: \d+ \|)+) (.*) \|")


@dataclass(frozen=True)
class Row:
    """One row of the table. `counts`: the number of settings with each of `STATUSES`."""

    script: str
    what: str
    commit: str
    counts: tuple[int, ...]
    dry_run: str

    def __str__(self) -> str:
        counts = " | ".join(map(str, self.counts))
        return f"| `{self.script}` {self.what} | `{self.commit}` | {counts} | {self.dry_run} |"


def rows(page: str) -> list[Row]:
    """Return the rows of the table in the text of the page."""
    found = []
    for line in page.splitlines():
        if match := _ROW.fullmatch(line):
            script, what, commit, counts, dry_run = match.groups()
            found.append(Row(script, what, commit, tuple(map(int, re.findall(r"\d+", counts))), dry_run))
    return found


def from_clone(clone: Path) -> Callable[[Row], str]:
    """Return a function that returns the text of a row's script. Raises CalledProcessError if the clone lacks it."""

    def text(row: Row) -> str:
        command = ["git", "-C", str(clone), "show", f"{row.commit}:{row.script}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return text


def converted(text: str, name: str) -> Conversion:
    """Convert a script without arguments, with the variables of `ENVIRONMENT`."""
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return convert([str(file)], ENVIRONMENT)


def remade(row: Row, text: str) -> Row:
    """Return the row with the counts of today."""
    made = converted(text, row.script)
    return replace(row, counts=tuple(len(made.having(status)) for status in STATUSES))


def main(words: list[str]) -> int:
    """Return 1 if a row differs and is not written."""
    clone, *options = words
    page, text_of = PAGE.read_text(encoding="utf-8"), from_clone(Path(clone))
    different = 0
    for row in rows(page):
        new = remade(row, text_of(row))
        if new != row:
            different += 1
            print(f"-{row}\n+{new}", flush=True)
            page = page.replace(str(row), str(new))
    if "--write" in options:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
