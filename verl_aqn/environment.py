"""The surroundings of a command: environment variables, home folder, terminal and signals.

This module is light, so that all others may import it.
"""

import atexit
import codecs
import contextlib
import io
import locale
import logging
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import MutableMapping
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from verl_aqn.cache import NO_HOME, cache_dir
from verl_aqn.errors import EnvironmentFault

SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD")
"""Part of the name of a variable with a secret, which is neither recorded nor sent to other machines."""

# Variables that mean nothing if empty. An empty CUDA_VISIBLE_DEVICES means no device, an empty VLLM_PLUGINS no plugin.
_NOTHING_IF_EMPTY = re.compile(
    r"HOME|TMPDIR|CXX|LD_PRELOAD|MPLCONFIGDIR|OMP_NUM_THREADS|(?!VLLM_PLUGINS$)"
    r"(XDG|RAY|HF|HUGGINGFACE|TRANSFORMERS|VERL|VLLM|TORCH\w*|TRITON|NCCL|HCCL|GLOO|"
    r"WANDB|MLFLOW|SWANLAB|TRACKIO|TENSORBOARD)_\w+"
)
# For terminals that lack these characters. Accents are dropped; other characters become question marks.
_PLAIN = {
    "σ": "sigma", "α": "alpha", "Δ": "delta", "Σ": "sum", "√": "sqrt", "∞": "inf", "✓": "ok", "✗": "x", "×": "x",
    "·": "*", "±": "+-", "≈": "~", "≤": "<=", "≥": ">=", "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "…": "...",
    "‘": "'", "’": "'", "“": '"', "”": '"', "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip


def settle() -> None:
    """Make a command independent of where it was started; call this once, before anything else.

    Files, pipes and child processes use UTF-8 whatever the locale is; if the locale differs, Python is started anew.
    Characters that a terminal cannot show are spelled out. Variables without a value are removed. SIGTERM ends the
    process cleanly.
    """
    for number in (0, 1, 2):  # the next opened file would get the number of a closed one, and would be written to
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    said = locale.getencoding().lower().replace("-", "")
    if said != "utf8" and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)  # the terminal's output stays as before
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    codecs.register_error("verl_aqn_plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="verl_aqn_plain")
    os.environ["PYTHONUTF8"] = "1"
    os.environ.pop("PYTHONIOENCODING", None)
    drop_empty(os.environ)
    _find_home()
    with contextlib.suppress(EnvironmentFault):  # reported where the cache is needed
        keep_off_home(os.environ)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if it cannot write into the home folder
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, partial(_end_in_order, os.getpid()))


def leave(code: object) -> NoReturn:
    """End the process as `sys.exit(code)` does, without taking apart what it imported.

    Python would look for cycles among all objects of torch and transformers, which takes one to two seconds. Threads
    are waited for, and exit handlers are called.
    """
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def drop_empty(env: MutableMapping[str, str]) -> None:
    """Remove variables that mean nothing because they are empty: `RAY_ADDRESS=""` is not an address."""
    for name in [name for name, value in env.items() if not value and _NOTHING_IF_EMPTY.fullmatch(name)]:
        del env[name]


def keep_off_home(env: MutableMapping[str, str]) -> None:
    """If the home folder is not writable, point libraries that would write there to the cache instead."""
    home = os.path.expanduser("~")
    there = home if os.path.isdir(home) else os.path.dirname(home)
    if not os.access(there, os.W_OK | os.X_OK):
        for name in ("HF_DATASETS_CACHE", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_HOME", "MPLCONFIGDIR"):
            env.setdefault(name, str(cache_dir() / "home" / name.lower()))


def cluster_address(config: Any = None) -> str | None:
    """Return the address of the Ray cluster that a run would join; None if it starts its own."""
    from omegaconf import OmegaConf

    said = OmegaConf.select(config, "ray_kwargs.ray_init.address") if config is not None else None
    address = said or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else str(address)


def _find_home() -> None:
    """Set HOME if there is no home folder.

    Without it, libraries write into a folder named ~ in the working directory.
    """
    if os.path.expanduser("~") == "~":  # no HOME, and the user is unknown
        try:
            os.environ["HOME"] = str(cache_dir() / "home")
        except EnvironmentFault:
            os.environ["HOME"] = NO_HOME
        os.environ.setdefault("LOGNAME", f"uid{os.getuid()}")  # without it, asking for the user's name is an error


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return _PLAIN.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def _end_in_order(main: int, number: int, _frame: FrameType | None) -> None:
    """Exit by an exception, so that everything is cleaned up. A child that has inherited this handler just ends."""
    if os.getpid() != main:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os.write(2, b"error: stopped by SIGTERM\n")
    raise SystemExit(128 + number)
