"""Find the line of a user's file that an error came from.

Standard library only, because reward workers and the driver import this module.
"""

import re
import traceback
from pathlib import Path

_FRAME = re.compile(r'^\s*File "([^"\n]+)", line (\d+), in ', re.MULTILINE)


def user_line(error: BaseException, path: str) -> str:
    """Return `FILE:LINE` of the deepest call in the user's file, or in any file outside the installed packages.

    Args:
        error: as raised in this process, or as sent by a Ray process, with its traceback as text.
        path: `reward.custom_reward_function.path`, or "".

    Returns:
        "" if no call is in a user's file.
    """
    seen = [
        (frame.filename, frame.lineno)
        for one in _chain(error)
        for frame in traceback.extract_tb(one.__traceback__)
    ]  # fmt: skip
    seen += [(file, int(line)) for file, line in _FRAME.findall(getattr(error, "traceback_str", ""))]
    file = Path(path.removeprefix("file://")).expanduser().absolute() if path and "pkg://" not in path else None
    theirs = [one for one in seen if file is not None and Path(one[0]) == file]
    theirs = theirs or [one for one in seen if _is_users(one[0])]
    return f"{theirs[-1][0]}:{theirs[-1][1]}" if theirs else ""


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error and the errors that it was raised from, the first cause last."""
    found = [error]
    while found[-1].__cause__ is not None and found[-1].__cause__ not in found:
        found.append(found[-1].__cause__)
    return found


def _is_users(file: str) -> bool:
    ours = Path(__file__).parents[1]
    stdlib = Path(re.__file__).parents[1]
    return not (
        file.startswith("<")
        or "site-packages" in file
        or "dist-packages" in file
        or Path(file).is_relative_to(ours)
        or Path(file).is_relative_to(stdlib)
    )
