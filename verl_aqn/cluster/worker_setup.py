"""The environment of a run's processes on a cluster. Ray calls `set_up_worker` in each of its workers before anything
else is imported there: libraries read much of it once, when they are loaded, so this module stays light."""

import os
import threading
import time
from pathlib import Path

from verl_aqn.cluster.process_environment import MEMORY_S, worker_environment
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import SharedMemory
from verl_aqn.runs.stacks import folder_in
from verl_aqn.runs.temporary import claim
from verl_aqn.safe_files import keep_to_oneself

# In the environment of every process of a run on a cluster, and so in that of the processes which those start.
RUN, TEMPORARY = "VERL_AQN_RUN", "VERL_AQN_TEMPORARY"


def set_up_worker() -> None:
    """As `verl_aqn.launch.supervise` does it for a run on one machine."""
    keep_to_oneself()
    run, temporary = RunFolder(Path(os.environ[RUN])), Path(os.environ[TEMPORARY])
    claim(temporary, run.path)
    folder_in(temporary).mkdir(exist_ok=True)
    if (run.path / "launch.yaml").exists():  # where it does not, `verl_api.nodes.check_nodes` says so
        os.environ.update(worker_environment(run, str(temporary)))
    threading.Thread(target=_watch_memory, args=(temporary,), daemon=True).start()


def _watch_memory(temporary: Path) -> None:
    """See what this worker and those that it starts map, for whoever cleans this node after the run."""
    memory = SharedMemory(temporary)
    while temporary.exists():
        memory.look()
        time.sleep(MEMORY_S)
