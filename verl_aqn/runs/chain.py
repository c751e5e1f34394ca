"""Link each record of a run to the record before it, so that an edited, lost or swapped record is detected.

The links protect against accidents and careless edits, not against forgery: someone who rewrites a whole file can
compute new links.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

LINK = "link"


def linked(before: bytes, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return `record` (plain JSON values) with its link.

    Args:
        before: the line of the previous record, without its newline; empty for the first record.
    """
    plain = {key: value for key, value in record.items() if key != LINK}
    return plain | {LINK: _link(_end_of(before), plain)}


def broken(lines: Iterable[bytes]) -> tuple[int, list[int]]:
    """Return how many of `lines` have a link, and the numbers (from 1) of lines that do not follow the previous line.

    Lines before the first link were written by an older version and are not counted as breaks.
    """
    count, breaks, before = 0, [], b""
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        link = record.pop(LINK, None)
        if (link is None and count) or (link is not None and link != _link(_end_of(before), record)):
            breaks.append(number)
        count += link is not None
        before = line
    return count, breaks


def _link(before: str, plain: Mapping[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()[:16]


def _end_of(line: bytes) -> str:
    """Return what the next record is linked to: the line's own link, or a digest of the line if it has no link."""
    if not line:
        return ""
    return json.loads(line).get(LINK) or hashlib.sha256(line).hexdigest()[:16]
