"""Nodes of the Ray cluster that this process has joined, and function calls on each of them."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def alive_nodes() -> dict[str, str]:
    """Return Ray's id → address for every node that is alive."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def on(node: str) -> dict[str, Any]:
    """Return the options of a remote function that runs on the node with this id, whatever else runs there."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def on_every_node(function: Any, *arguments: Any) -> list[Any]:
    """Call a function once on each node and return the results."""
    task = ray.remote(function)
    return ray.get([task.options(**on(node)).remote(*arguments) for node in alive_nodes()])
