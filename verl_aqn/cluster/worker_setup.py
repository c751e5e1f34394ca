"""The environment of a run's processes on a cluster.

Ray calls `set_up_worker` in each of its workers before any other import. Libraries read much of the environment once,
when they are loaded, so this module must stay light.
"""

import hashlib
import os
import threading
import time
from pathlib import Path

from verl_aqn.cluster.process_environment import MEMORY_S, launched, worker_environment
from verl_aqn.cluster.shared_disk import wait_until
from verl_aqn.errors import AqnError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import SharedMemory
from verl_aqn.runs.stacks import folder_in
from verl_aqn.runs.temporary import claim
from verl_aqn.safe_files import keep_to_oneself

# Environment variables of every process of a run on a cluster; child processes inherit them.
RUN, TEMPORARY = "VERL_AQN_RUN", "VERL_AQN_TEMPORARY"
LAUNCH = "VERL_AQN_LAUNCH"  # the mark of the attempt (`launch_mark`)
_began = time.monotonic()  # of this process: it waits for the shared disk only once
_done = False


def set_up_worker() -> None:
    """Set up this worker as `verl_aqn.launch.supervise` does it for a run on one machine."""
    keep_to_oneself()
    run, temporary = RunFolder(Path(os.environ[RUN])), Path(os.environ[TEMPORARY])
    claim(temporary, run.path)
    folder_in(temporary).mkdir(exist_ok=True)
    take_environment(run)  # if it cannot, `cluster_nodes.check_nodes` reports it
    threading.Thread(target=_watch_memory, args=(temporary,), daemon=True).start()


def take_environment(run: RunFolder) -> bool:
    """Take the environment of the attempt from the run folder, once this node sees the attempt's files.

    Return False if they are missing, or still those of an earlier attempt, after the limit for the shared disk.
    """
    global _done
    mark = os.environ.get(LAUNCH)
    if not _done and mark and wait_until(lambda: launch_mark(run) == mark, _began):
        os.environ.update(worker_environment(run, launched(run), os.environ[TEMPORARY]))
        _done = True
    return _done


def launch_mark(run: RunFolder) -> str | None:
    """Return the number of the attempt and the digest of its config as this node sees them.

    None: it does not see them whole. A retry replaces both files, and a slow disk shows the old ones for some time.
    """
    try:
        return f"{run.state['attempt']} {hashlib.sha256((run.path / 'launch.yaml').read_bytes()).hexdigest()}"
    except (OSError, AqnError):
        return None


def _watch_memory(temporary: Path) -> None:
    """Record the shared memory that this worker and its children map, for the clean-up of this node after the run."""
    memory = SharedMemory(temporary)
    while temporary.exists():
        memory.look()
        time.sleep(MEMORY_S)
