"""Walking through records that consist of dicts and lists."""

from collections.abc import Iterator
from typing import Any


def paths(value: Any, before: tuple = ()) -> Iterator[tuple]:
    """Yield the path of everything inside a record, without the record itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from paths(inner, (*before, key))
