"""The nodes of the Ray cluster that this process has joined, and work for each of them."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def alive_nodes() -> dict[str, str]:
    """Ray's id and the address of every node."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def on(node: str) -> dict[str, Any]:
    """Options of a remote function that is to run on the node of this id, beside whatever runs there."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def on_every_node(function: Any, *arguments: Any) -> list[Any]:
    """The answers of a function, called once on each node."""
    task = ray.remote(function)
    return ray.get([task.options(**on(node)).remote(*arguments) for node in alive_nodes()])
