"""The environment of a run's processes: those of its own Ray, of a cluster's, and of an engine."""

import importlib.util
import os
import secrets
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir
from verl_aqn.config.trackers import stay_here
from verl_aqn.environment import cluster_address, drop_empty, keep_off_home
from verl_aqn.runs import faults, stacks
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.host import threads
from verl_aqn.runs.old_names import load_recorded
from verl_aqn.safe_files import own_folder

MEMORY_S = 5  # between checks of shared memory
KEEPING = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
"""jemalloc's options: freed memory is kept, also that of large blocks."""
PAGE = 4096  # bytes of the pages that it was built for
RAY = {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def environment(run: RunFolder, config: DictConfig, temporary: str) -> dict[str, str]:
    """Return the environment of the training process. All processes of a Ray that it starts inherit it."""
    env = worker_environment(run, config, temporary)
    env.pop("RAY_ADDRESS", None)
    if (address := cluster_address(config)) is None:
        return env | local_ray(temporary)
    # The run may override the environment that its job was submitted with.
    return env | RAY | {"RAY_ADDRESS": address, "RAY_TMPDIR": temporary, "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}


def local_ray(temporary: str) -> dict[str, str]:
    """Return the environment variables for a process that starts its own Ray."""
    return RAY | {
        "RAY_TMPDIR": temporary,
        # With 0, Ray uses this machine only: it binds to loopback, and verl's servers take their address from Ray.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A separate token for this run. Ray would put one token into the home folder, which other users can read.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_prestart_worker_first_driver": "0",  # it would have an environment that no task of a run uses
        "RAY_worker_register_timeout_seconds": "600",  # the first one waits until its parent has finished its imports
    }


def worker_environment(run: RunFolder, config: DictConfig, temporary: str) -> dict[str, str]:
    """Return the environment variables for every worker of the run, whose config is `launched`, on any machine."""
    ranks = int(config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    env = engine_environment(temporary, cpu=config.aqn.profile == "cpu", ranks=ranks)
    if config.aqn.profile == "cpu":
        env = allocator() | env
    env["HYDRA_FULL_ERROR"] = "1"
    env[stacks.FOLDER] = str(stacks.folder_in(temporary))
    env[faults.PLACE] = str(run.path / faults.FILE)
    stay_here(env, run.path, run.state["attempt"])
    return env


def allocator() -> dict[str, str]:
    """Return the environment of a process on a CPU whose allocator is the jemalloc in Ray's package.

    Tensors of many sizes, some of which live until the backward pass, leave holes in glibc's heap that are not used
    again, and glibc returns blocks above 32 MB to the system, which then has to find and clear their pages once more.
    Empty if Ray has no such file, if the user has preloaded a library, if the loader would read the file's path as
    something else (it splits LD_PRELOAD at spaces and colons, and replaces names after "$"), or if pages are larger
    than the 4 kB that jemalloc was built for, because it would end the process (on some ARM machines).
    """
    found = importlib.util.find_spec("ray")
    library = Path(found.origin).parent / "core/libjemalloc.so" if found and found.origin else None
    if library is None or not library.is_file() or set(str(library)) & set(" :$"):
        return {}
    if os.environ.get("LD_PRELOAD") or os.sysconf("SC_PAGE_SIZE") > PAGE:
        return {}
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": KEEPING}


def starts_warm(config: DictConfig) -> bool:
    """Return whether the processes of a run are forked: on CPUs, if the run starts its own Ray.

    They are not if verl's `run_ppo` would do more than start Ray: determinism (which needs its own hash seed, while a
    forked process has its parent's), the insight logger, a timeline at the end. A Python interpreter that the user
    chose also excludes forking, and so do variables for the workers: torch, vLLM and others read theirs while they are
    imported, which a fork's parent has done.
    """
    deterministic = config.actor_rollout_ref.rollout.full_determinism
    timeline = config.ray_kwargs.get("timeline_json_file")
    runtime = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env") or {}
    own = runtime.get("py_executable") or {*(runtime.get("env_vars") or {})} - {"VERL_PLATFORM"}  # the profile's
    other = deterministic or timeline or own or "rl_insight" in config.trainer.logger
    return config.aqn.profile == "cpu" and cluster_address(config) is None and not other


def launched(run: RunFolder) -> DictConfig:
    """Return the config of the newest attempt."""
    return load_recorded(run.path / "launch.yaml")


def engine_environment(temporary: str, *, cpu: bool, ranks: int) -> dict[str, str]:
    """Return the environment of a process with vLLM in it.

    Sockets and temporary files go to `temporary`, and usage statistics are off. `cpu`: the process runs on this
    machine's cores, which the `ranks` of an engine share.
    """
    compiled = cache_dir() / "torchinductor"
    own_folder(compiled, "VERL_AQN_CACHE=DIR", make=False, or_roots=True)  # files in this folder are loaded as code
    cores = sorted(os.sched_getaffinity(0))
    env = dict(os.environ) | {"PYTHONUTF8": "1"}
    drop_empty(env)
    keep_off_home(env)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # ten processes import verl; compiled files save 6 s in each
    count = threads()
    env.setdefault("OMP_NUM_THREADS", str(count))
    env.update(
        TMPDIR=temporary,
        VLLM_RPC_BASE_PATH=temporary,
        TORCHINDUCTOR_CACHE_DIR=str(compiled),
        TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS="0",  # these headers would go to TMPDIR and cost 10 s in each run
        TOKENIZERS_PARALLELISM="false",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="false",  # by HTTP, which verl opens to everybody but does not use itself
        DO_NOT_TRACK="1",
    )
    if cpu:
        env["VERL_PLATFORM"] = "cpu"
        env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses a simulated GPU together with an empty list
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # If this process has only a part of the time of many cores, do not bind: other processes may use any core.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind_cores(cores, ranks) if count == len(cores) else "nobind")
    return env


def bind_cores(cores: list[int], ranks: int) -> str:
    """Return the cores of each tensor-parallel rank of an engine in vLLM's format ("0,1|2,3").

    Actor and rollout take turns, so an engine uses all cores in its phase and divides them among its ranks. If there
    are more ranks than cores, ranks share cores.
    """
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)
