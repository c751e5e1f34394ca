"""Records of a run, read while they are written."""

import json
from pathlib import Path


class Tail:
    """New lines of a JSON-lines file, starting from the end of the file when this object was made."""

    def __init__(self, path: Path):
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict]:
        """Return the records that were added since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        whole, _, _ = data.rpartition(b"\n")
        if not whole:
            return []
        self.position += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]
