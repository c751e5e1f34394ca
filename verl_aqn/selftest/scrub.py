"""Remove from texts what says whose machine they come from. Imports nothing but the standard library.

What is removed: the names of machine and user, the home folder, all absolute paths (the name of a source file or
library stays), IP and MAC addresses, e-mail addresses, hosts in addresses of the web, and UUIDs.
"""

import getpass
import ipaddress
import os
import platform
import pwd
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEPT = re.compile(r"[\w.-]+\.(py|cpp|cu|so|h|hpp|json|jsonl|safetensors|yaml|toml)(\.\d+)*")
_PATH = re.compile(r"(?<![\w./<>-])~?(?:/[^\s/:;,'\"`()\[\]{}<>|=]+)+/?")
_FILE_URL = re.compile(r"\bfile:/+[^\s'\"]+")
_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^\s/'\"<>]+)")
_V4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_V6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?:%\w+)?(?![\w:])")
_MAC = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}[:-]){5,}[0-9A-Fa-f]{2}(?![\w:-])")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_UUID = re.compile(r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b")
_KNOWN_HOSTS = ("github.com", "pytorch.org", "docs.pytorch.org", "docs.vllm.ai", "pypi.org", "huggingface.co")


@dataclass(frozen=True)
class Owner:
    """Names of a machine and its user that must not appear."""

    hosts: tuple[str, ...]
    users: tuple[str, ...]
    homes: tuple[str, ...]


def owner() -> Owner:
    """Return the names of this machine and of the user who runs this process."""
    hosts = {platform.node(), socket.gethostname(), os.environ.get("HOSTNAME", "")}
    hosts |= {name.partition(".")[0] for name in hosts}
    users = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER", "USERNAME")}
    homes = {os.path.expanduser("~"), os.environ.get("HOME", "")}
    with suppress(OSError, KeyError):
        users.add(getpass.getuser())
    with suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        users |= {entry.pw_name, entry.pw_gecos.split(",")[0]}
        homes.add(entry.pw_dir)
    users |= {Path(home).name for home in homes}
    return Owner(_names(hosts - {"localhost"}), _names(users), _names(homes - {"/"}))


def _names(found: Iterable[str]) -> tuple[str, ...]:
    """Return the names, longest first, so that a name inside another one is not replaced before it."""
    return tuple(sorted({name for name in found if name and name != "~"}, key=lambda name: (-len(name), name)))


def scrub(text: str, whose: Owner) -> str:
    """Return `text` without names, paths and addresses of the machine."""
    for home in whose.homes:
        text = text.replace(home.rstrip("/"), "~") if len(home) > 1 else text
    text = _MAIL.sub("<mail>", _FILE_URL.sub("<path>", text))
    text = _URL.sub(lambda found: found[1] + (found[2] if found[2] in _KNOWN_HOSTS else "<host>"), text)
    urls: list[str] = []

    def keep(found: re.Match[str]) -> str:
        urls.append(found[0])
        return f"\0{len(urls) - 1}\0"

    text = re.sub(rf"https?://(?:{'|'.join(map(re.escape, _KNOWN_HOSTS))})[^\s'\"<>]*", keep, text)
    text = _PATH.sub(_path, text)
    for name, names in (("<host>", whose.hosts), ("<user>", whose.users)):
        for one in names:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(one)}(?![A-Za-z0-9])", name, text, flags=re.IGNORECASE)
    text = _UUID.sub("<uuid>", _MAC.sub("<mac>", text))
    text = _V6.sub(_address(ipaddress.IPv6Address), _V4.sub(_address(ipaddress.IPv4Address), text))
    return re.sub(r"\0(\d+)\0", lambda found: urls[int(found[1])], text)


def scrub_all(value: Any, whose: Owner) -> Any:
    """Return a JSON value with every text in it scrubbed, also keys."""
    if isinstance(value, str):
        return scrub(value, whose)
    if isinstance(value, dict):
        return {scrub(str(key), whose): scrub_all(one, whose) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_all(one, whose) for one in value]
    return value


def _path(found: re.Match[str]) -> str:
    name = found[0].rstrip("/").rpartition("/")[2]
    return f"<path>/{name}" if _KEPT.fullmatch(name) else "<path>"


def _address(kind: Callable[[str], Any]) -> Callable[[re.Match[str]], str]:
    def replace(found: re.Match[str]) -> str:
        text = found[0].rstrip(".").rstrip(":") if found[0].endswith(".") else found[0]
        try:
            kind(text.partition("%")[0])
        except ValueError:
            return found[0]
        return "<ip>" if text != "::" else text

    return replace
