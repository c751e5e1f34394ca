"""The environment of a run's processes on a cluster.

Ray calls `set_up_worker` in each of its workers before any other import. Libraries read much of the environment once,
when they are loaded, so this module must stay light.
"""

import os
import threading
import time
from pathlib import Path

from verl_aqn.cluster.process_environment import MEMORY_S, launched, worker_environment
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import SharedMemory
from verl_aqn.runs.stacks import folder_in
from verl_aqn.runs.temporary import claim
from verl_aqn.safe_files import keep_to_oneself

# Environment variables of every process of a run on a cluster; child processes inherit them.
RUN, TEMPORARY = "VERL_AQN_RUN", "VERL_AQN_TEMPORARY"


def set_up_worker() -> None:
    """Set up this worker as `verl_aqn.launch.supervise` does it for a run on one machine."""
    keep_to_oneself()
    run, temporary = RunFolder(Path(os.environ[RUN])), Path(os.environ[TEMPORARY])
    claim(temporary, run.path)
    folder_in(temporary).mkdir(exist_ok=True)
    if (run.path / "launch.yaml").exists():  # if it does not, `cluster_nodes.check_nodes` reports it
        os.environ.update(worker_environment(run, launched(run), str(temporary)))
    threading.Thread(target=_watch_memory, args=(temporary,), daemon=True).start()


def _watch_memory(temporary: Path) -> None:
    """Record the shared memory that this worker and its children map, for the clean-up of this node after the run."""
    memory = SharedMemory(temporary)
    while temporary.exists():
        memory.look()
        time.sleep(MEMORY_S)
