"""Where experiment trackers (`trainer.logger` of verl) write: into the run folder, and nothing goes over the network.

verl writes to where each tracker's environment says, and else to the working directory, /tmp, the home directory or a
server. What the user has set in the environment stays: `WANDB_MODE=online` is how one chooses a server.
"""

from collections.abc import MutableMapping
from pathlib import Path

from verl_aqn.cache import cache_dir

# What verl's `Tracking` takes; "tracking" is its old name of wandb.
LOGGERS = (
    "console", "tensorboard", "wandb", "mlflow", "swanlab", "trackio", "file", "clearml", "vemlp_wandb", "rl_insight",
    "tracking",
)  # fmt: skip


def stay_here(env: MutableMapping[str, str], folder: Path, attempt: int) -> None:
    """Fill in `env`, of the training process, for a run in `folder`; `attempt` counts from 1."""
    defaults = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,  # it makes wandb/ there
        "WANDB_CACHE_DIR": cache_dir(),
        "WANDB_DATA_DIR": cache_dir() / "wandb",  # tables on their way to a server
        "WANDB_ERROR_REPORTING": "false",
        # Files, which any mlflow reads and writes: with a database, artifacts go to ./mlruns whatever one says.
        "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "SWANLAB_MODE": "offline",
        "UV_NO_CACHE": "1",  # swanlab asks uv, where there is one, what is installed
        "SWANLAB_LOG_DIR": folder / "swanlab",
        "TRACKIO_DIR": folder / "trackio",
        "TENSORBOARD_DIR": folder / "tensorboard",
    }
    if "VERL_FILE_LOGGER_ROOT" not in env:  # verl looks at the path first
        # verl opens it anew, so each attempt has one.
        defaults["VERL_FILE_LOGGER_PATH"] = folder / f"tracked-{attempt}.jsonl"
    for name, value in defaults.items():
        env.setdefault(name, str(value))
    if env["SWANLAB_MODE"] not in ("online", "cloud"):
        env.pop("SWANLAB_API_KEY", None)  # verl logs in wherever there is one
