"""`python -m tests.integration.late_disk BASE MODEL`: the part of a run on two nodes that crosses the disk they share.

A run folder is made as `verl-aqn train` makes it. Then this process joins the cluster at RAY_ADDRESS as the driver
does. The other node checks both nodes as the task runner does and writes the last record of a run. Nothing is trained.
The result is one JSON line.
"""

import json
import os
import sys
import time
from pathlib import Path

import ray
from omegaconf import DictConfig, OmegaConf

from tests.integration.conftest import TINY
from verl_aqn.cluster.nodes import alive_nodes, on
from verl_aqn.cluster.process_environment import launched
from verl_aqn.config.compose import load_recipe
from verl_aqn.integrations.verl.cluster_nodes import check_nodes, join, settle
from verl_aqn.runs import stacks, temporary
from verl_aqn.runs.folder import folder_of, open_run


def other_node(config: DictConfig) -> dict:
    """Check the nodes and write a record. Return what this worker got from the run folder."""
    began = time.monotonic()
    check_nodes(config)
    folder_of(config).append("metrics.jsonl", {"kind": "step", "step": 3})
    seconds = time.monotonic() - began
    return {"address": ray.util.get_node_ip_address(), "seconds": seconds, "stacks": os.environ.get(stacks.FOLDER)}


def part(base: Path, model: Path) -> dict:
    config = load_recipe("e12_aggressive_1ep", [*TINY, f"actor_rollout_ref.model.path={model}", f"aqn.run.dir={base}"])
    config.data.train_files = config.data.val_files = str(model / "config.json")  # any file that both nodes have
    run = open_run(base, {"config": "of this test"})
    config.trainer.default_local_dir = str(run.checkpoints)
    run.replace_text("launch.yaml", OmegaConf.to_yaml(config, resolve=True))
    run.append("events.jsonl", {"kind": "attempt"})
    os.environ["TMPDIR"], lock = temporary.make(run.path)
    config = launched(run)
    join(config, run)
    ray.init(**OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True))
    try:
        here = ray.util.get_node_ip_address()
        (there,) = [node for node, address in alive_nodes().items() if address != here]
        result = ray.get(ray.remote(other_node).options(**on(there)).remote(config))
        result["before"] = len(list(run.read("metrics.jsonl")))
        settle(run)
        result["after"] = len(list(run.read("metrics.jsonl")))
    finally:
        ray.shutdown()
        os.close(lock)
        temporary.remove(Path(os.environ["TMPDIR"]), run.path)  # both nodes are on this machine
    result["nodes"] = [record["address"] for record in run.read("evidence.jsonl") if record["kind"] == "node"]
    result["warnings"] = [record["text"] for record in run.read("events.jsonl") if record["kind"] == "warning"]
    return result


if __name__ == "__main__":
    print(json.dumps(part(*map(Path, sys.argv[1:]))))
