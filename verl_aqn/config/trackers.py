"""Settings that make experiment trackers (verl's `trainer.logger`) write into the run folder and not over the network.

Each tracker writes where its environment variables say, or else to the working directory, /tmp, the home directory or a
server. Variables that the user has set are not changed: `WANDB_MODE=online` sends data to a server.
"""

from collections.abc import MutableMapping
from pathlib import Path

from verl_aqn.cache import cache_dir

# The loggers that verl's `Tracking` accepts; "tracking" is its old name for wandb.
LOGGERS = (
    "console", "tensorboard", "wandb", "mlflow", "swanlab", "trackio", "file", "clearml", "vemlp_wandb", "rl_insight",
    "tracking",
)  # fmt: skip


def stay_here(env: MutableMapping[str, str], folder: Path, attempt: int) -> None:
    """Set the variables of all trackers in `env`, the environment of the training process, unless they are set already.

    Args:
        folder: the run folder. attempt: number of this attempt at the run, from 1.
    """
    defaults = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,  # wandb creates wandb/ in it
        "WANDB_CACHE_DIR": cache_dir(),
        "WANDB_DATA_DIR": cache_dir() / "wandb",  # tables that wait for their upload
        "WANDB_ERROR_REPORTING": "false",
        # Every mlflow reads and writes plain files. With a database, it always writes artifacts to ./mlruns.
        "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "SWANLAB_MODE": "offline",
        "UV_NO_CACHE": "1",  # swanlab runs uv, if it is installed, to list the packages
        "SWANLAB_LOG_DIR": folder / "swanlab",
        "TRACKIO_DIR": folder / "trackio",
        "TENSORBOARD_DIR": folder / "tensorboard",
    }
    if "VERL_FILE_LOGGER_ROOT" not in env:  # verl prefers the path to the root
        # verl overwrites an existing file, so each attempt gets its own.
        defaults["VERL_FILE_LOGGER_PATH"] = folder / f"tracked-{attempt}.jsonl"
    for name, value in defaults.items():
        env.setdefault(name, str(value))
    if env["SWANLAB_MODE"] not in ("online", "cloud"):
        env.pop("SWANLAB_API_KEY", None)  # verl logs in whenever this is set
