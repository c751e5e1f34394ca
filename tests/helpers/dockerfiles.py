"""The steps of a Dockerfile, with the user, folder and environment that are in force at each of them.

Only what the files in scripts/containers use is known. Anything else is refused, because a step that is guessed wrongly
would be reported as tried.
"""

import json
import re
import shlex
from dataclasses import dataclass

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KNOWN = ("FROM", "ARG", "ENV", "WORKDIR", "COPY", "USER", "RUN", "ENTRYPOINT", "CMD")
_VARIABLE = re.compile(r"\\\$|\$(?:(\w+)|\{(\w+)\}|(\{[^}]*\}?))")


class Unknown(Exception):
    """A line that the parser does not know. The message begins with the line's number."""


@dataclass(frozen=True)
class Step:
    """One step of a build.

    `name`: the instruction; START is the container's start, after the last instruction. `text`: what follows the
    instruction, with variables replaced where Docker replaces them. `user`, `folder` and `environment` are those in
    force. `owner`: of COPY --chown, or "". `command`: of START.
    """

    line: int
    name: str
    text: str
    user: str = "root"
    folder: str = "/"
    environment: tuple[tuple[str, str], ...] = ()
    owner: str = ""
    command: tuple[str, ...] = ()


def instructions(text: str) -> list[tuple[int, str, str]]:
    """Return line, name and arguments of each instruction. Comments are dropped and continued lines are joined."""
    found, begun, parts = [], 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            if re.match(r"#\s*(escape|syntax|check)\s*=", line):
                raise Unknown(f"line {number}: a parser directive: {line}")
            continue
        begun = begun or number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = " ".join(part for part in parts if part).partition(" ")
        if name not in _KNOWN:
            raise Unknown(f"line {begun}: {name} is not one of {', '.join(_KNOWN)}")
        found.append((begun, name, rest.strip()))
        begun, parts = 0, []
    if parts:
        raise Unknown(f"line {begun}: the file ends inside this instruction")
    return found


def steps(text: str, arguments: dict[str, str] | None = None) -> list[Step]:
    """Return the steps of a Dockerfile in order. `arguments`: values for ARG, like docker's --build-arg.

    Raises:
        Unknown: an instruction, a flag or a form that is not known here.
    """
    given, values = dict(arguments or {}), {}  # ARGs before FROM are known in FROM only
    user, folder, environment = "root", "/", {"PATH": SYSTEM_PATH}
    based, start, found = False, {"ENTRYPOINT": (), "CMD": ()}, []
    for line, name, rest in instructions(text):
        if not based and name not in ("ARG", "FROM"):
            raise Unknown(f"line {line}: {name} before FROM")
        known = {**values, **(environment if based else {})}
        owner = ""
        if name == "RUN":
            if rest.startswith(("--", "[")) or "<<" in rest:
                raise Unknown(f"line {line}: RUN with flags, as a list or with a here-document: {rest}")
        elif name in start:
            start[name] = _command(line, name, rest)
            if name == "ENTRYPOINT":
                start["CMD"] = ()  # the base image's own CMD ends with a new ENTRYPOINT; ours must follow it
        else:
            rest = _replace(line, rest, known)
        if name == "FROM":
            if based or " " in rest:
                raise Unknown(f"line {line}: more than one stage, a named stage or a platform: {rest}")
            based, values = True, {}
        elif name == "ARG":
            words = shlex.split(rest)
            key, has, value = words[0].partition("=")
            if len(words) > 1 or (not has and key not in given):
                raise Unknown(f"line {line}: ARG {rest} needs one name and a value")
            values[key] = given.get(key, value)
        elif name == "ENV":
            pairs = [word.partition("=") for word in shlex.split(rest)]
            if not all(has for _, has, _ in pairs):
                raise Unknown(f"line {line}: ENV without =: {rest}")
            environment |= {key: value for key, _, value in pairs}
        elif name == "WORKDIR":
            folder = rest if rest.startswith("/") else f"{folder.rstrip('/')}/{rest}"
        elif name == "USER":
            if ":" in rest:
                raise Unknown(f"line {line}: USER with a group: {rest}")
            user = rest
        elif name == "COPY":
            owner, rest = _copy(line, rest)
        state = tuple({**values, **environment}.items()) if name == "RUN" else tuple(environment.items())
        found.append(Step(line, name, rest, user, folder, state, owner))
    if not based:
        raise Unknown("line 1: no FROM")
    if command := start["ENTRYPOINT"] + start["CMD"]:
        last = tuple(environment.items())
        found.append(Step(0, "START", shlex.join(command), user, folder, last, command=command))
    return found


def _replace(line: int, text: str, known: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            raise Unknown(f"line {line}: {match[0]} has no value here")
        return known[name]

    return _VARIABLE.sub(value, text)


def _copy(line: int, rest: str) -> tuple[str, str]:
    words, owner = shlex.split(rest), ""
    while words and words[0].startswith("--"):
        flag, _, owner = words.pop(0).partition("=")
        if flag != "--chown":
            raise Unknown(f"line {line}: COPY {flag} is not known")
    if len(words) < 2 or any(re.search(r"[*?\[]|\.\.", word) for word in words):
        raise Unknown(f"line {line}: COPY needs plain sources and a target: {rest}")
    return owner, shlex.join(words)


def _command(line: int, name: str, rest: str) -> tuple[str, ...]:
    try:
        words = json.loads(rest)
    except ValueError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Unknown(f"line {line}: {name} must be a list of strings in JSON: {rest}")
    return tuple(words)
