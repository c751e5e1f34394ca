"""What a command finds around it: its environment, home folder and terminal, and signals. Light: all may import it."""

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
from typing import Any

from verl_aqn.cache import NO_HOME, cache_dir
from verl_aqn.errors import EnvironmentFault

# Variables that say nothing where they are empty. Others may (CUDA_VISIBLE_DEVICES: no device; VLLM_PLUGINS: none).
_NOTHING_IF_EMPTY = re.compile(
    r"HOME|TMPDIR|CXX|MPLCONFIGDIR|OMP_NUM_THREADS|(?!VLLM_PLUGINS$)"
    r"(XDG|RAY|HF|HUGGINGFACE|TRANSFORMERS|VERL|VLLM|TORCH\w*|TRITON|NCCL|HCCL|GLOO|"
    r"WANDB|MLFLOW|SWANLAB|TRACKIO|TENSORBOARD)_\w+"
)
# For terminals that lack them. Letters with accents lose those, and what is left becomes a question mark.
_PLAIN = {
    "σ": "sigma", "α": "alpha", "Δ": "delta", "Σ": "sum", "√": "sqrt", "∞": "inf", "✓": "ok", "✗": "x", "×": "x",
    "·": "*", "±": "+-", "≈": "~", "≤": "<=", "≥": ">=", "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "…": "...",
    "‘": "'", "’": "'", "“": '"', "”": '"', "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip


def settle() -> None:
    """Make the process of a command independent of where it was started; called once, before anything else.

    Files, pipes and child processes are in UTF-8 whatever the locale says, which takes a new start of Python where it
    says something else. What a terminal cannot show is spelled out. Variables without a value are as good as none.
    SIGTERM ends the process in order.
    """
    for number in (0, 1, 2):  # a closed one would be the number of the next file that is opened, and be written to
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    said = locale.getencoding().lower().replace("-", "")
    if said != "utf8" and not sys.flags.utf8_mode and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)  # what the terminal shows is as before
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    codecs.register_error("verl_aqn_plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="verl_aqn_plain")
    os.environ["PYTHONUTF8"] = "1"
    os.environ.pop("PYTHONIOENCODING", None)
    drop_empty(os.environ)
    _find_home()
    with contextlib.suppress(EnvironmentFault):  # told where the cache is needed
        keep_off_home(os.environ)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it cannot write into the home folder
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, partial(_end_in_order, os.getpid()))


def drop_empty(env: MutableMapping[str, str]) -> None:
    """Remove variables that say nothing because they are empty: `RAY_ADDRESS=""` is no address."""
    for name in [name for name, value in env.items() if not value and _NOTHING_IF_EMPTY.fullmatch(name)]:
        del env[name]


def keep_off_home(env: MutableMapping[str, str]) -> None:
    """Where the home folder cannot be written, tell libraries to keep in the cache what they would keep there."""
    home = os.path.expanduser("~")
    there = home if os.path.isdir(home) else os.path.dirname(home)
    if not os.access(there, os.W_OK | os.X_OK):
        for name in ("HF_DATASETS_CACHE", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_HOME", "MPLCONFIGDIR"):
            env.setdefault(name, str(cache_dir() / "home" / name.lower()))


def cluster_address(config: Any = None) -> str | None:
    """Where the Ray cluster is that a run would join; None where it starts one of its own."""
    from omegaconf import OmegaConf

    said = OmegaConf.select(config, "ray_kwargs.ray_init.address") if config is not None else None
    address = said or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else str(address)


def _find_home() -> None:
    """Without a home folder libraries write into a folder called ~ of the working folder: give them a real one."""
    if os.path.expanduser("~") == "~":  # no HOME, and no such user
        try:
            os.environ["HOME"] = str(cache_dir() / "home")
        except EnvironmentFault:
            os.environ["HOME"] = NO_HOME
        os.environ.setdefault("LOGNAME", f"uid{os.getuid()}")  # who asks for the user's name gets an error else


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelled, error.object[error.start : error.end])), error.end


def _spelled(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte of a file's name that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return _PLAIN.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"


def _end_in_order(main: int, number: int, _frame: FrameType | None) -> None:
    """End as by an exception, so that everything is cleaned up. A child that has inherited this just ends."""
    if os.getpid() != main:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os.write(2, b"error: stopped by SIGTERM\n")
    raise SystemExit(128 + number)
