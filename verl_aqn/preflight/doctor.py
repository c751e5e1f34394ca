"""`verl-aqn doctor`: check that this machine has everything that a run needs, and that the run fits."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.cluster.process_environment import allocator
from verl_aqn.config.compose import detect_profile, load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.environment import cluster_address
from verl_aqn.errors import AqnError, ConfigError, first_line
from verl_aqn.preflight import npu_found as npu
from verl_aqn.preflight import recipe_checks as checks
from verl_aqn.preflight.findings import Finding
from verl_aqn.preflight.node import Node, cluster_nodes, local_node
from verl_aqn.preflight.prepare import find_model, positions_of


@dataclass
class Report:
    """The results; `memory` and `plan` are in bytes, and are set only if a recipe was given."""

    findings: list[Finding] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    plan: list[dict[str, Any]] | None = None

    @property
    def faults(self) -> int:
        return sum(bool(finding.fix) for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"checks": [f.to_dict() for f in self.findings], "memory": self.memory, "plan": self.plan}


def examine(recipe: str | None = None, overrides: list[str] | None = None, *, plan: bool = False) -> Report:
    """Examine this machine, or every node of the cluster that a run would join; with a recipe also its requirements."""
    if recipe is None and plan:
        raise ConfigError("doctor --plan needs a recipe")
    config = load_recipe(recipe, overrides) if recipe else None
    profile = parse_aqn(config).profile if config is not None else detect_profile()
    report = Report()
    if plan:  # needs no device of this machine
        assert config is not None
        report.plan = _plan(config)
        return report
    from verl_aqn.mxfp4.kernels import native

    report.findings.append(Finding("profile", profile))
    if profile == "npu":
        report.findings += npu.examine()
    kernels = native.status()
    found = "compiled" if kernels.available else f"plain PyTorch, several times slower: {kernels.detail}"
    report.findings.append(Finding("MXFP4 on CPU", found))
    if profile == "cpu":
        found = "jemalloc, from Ray's package" if allocator() else "not Ray's jemalloc, so a run needs more memory"
        report.findings.append(Finding("allocator", found))
    run = parse_aqn(config).run.dir if config is not None else None
    nodes = _nodes(report, config, str(Path(run or "/tmp").expanduser()), profile)
    for node in nodes:
        report.findings += checks.check_node(node, nodes[0], f" of {node.host}" if len(nodes) > 1 else "")
    if config is not None:
        _recipe(report, config, nodes)
    return report


def _nodes(report: Report, config: DictConfig | None, folder: str, profile: str) -> list[Node]:
    address = cluster_address(config)
    if address is None:
        return [local_node(folder, profile)]
    try:
        nodes, resources = cluster_nodes(address, folder, profile)
    except ConnectionError as error:
        report.findings.append(Finding("Ray cluster", first_line(error), f"start it, or unset RAY_ADDRESS ({address})"))
        return []
    wanted = int(config.trainer.nnodes) if config is not None else 1
    fix = f"add nodes, or set trainer.nnodes to {len(nodes)}" if len(nodes) < wanted else ""
    has = ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU", "NPU") if name in resources)
    report.findings.append(Finding("Ray cluster", f"{len(nodes)} node(s) at {address}: {has}", fix))
    return nodes


def _recipe(report: Report, config: DictConfig, nodes: list[Node]) -> None:
    findings = report.findings
    findings += checks.check_recipe(config)
    findings.append(checks.check_reward_function(config))
    findings += checks.check_verl(config)
    findings += checks.check_adapter(config)
    findings += checks.check_ports(config)
    findings += checks.check_places(config)
    findings.append(checks.check_schedule(config))
    shape = None
    try:
        shape = checks.recipe_shape(config)
    except AqnError as error:
        findings.append(Finding("model", str(error), "set actor_rollout_ref.model.path to a folder with config.json"))
    for node in nodes:
        where = f" of {node.host}" if len(nodes) > 1 else ""
        findings.append(checks.check_devices(config, len(node.devices), where))
        findings += checks.check_storage(config, shape, node.shared_memory, node.disk, where)
        if shape is not None:
            findings += checks.check_memory(config, shape, node.memory, node.devices, where)
    folder = find_model(config, weights=False) if shape is not None else None
    findings += checks.check_settings(config, positions_of(folder) if folder else None)
    if shape is not None and folder is not None:
        findings += checks.check_served(config, folder)
        findings.append(checks.check_rows(config))
        findings += checks.check_heads(config, shape)
        findings += checks.check_experts(config, shape)
        report.memory = checks.memory_of(config, shape)


def _plan(config: DictConfig) -> list[dict[str, Any]]:
    from verl_aqn.preflight.device_plan import plan
    from verl_aqn.preflight.memory_plan import sizes

    return [found.to_dict() for found in plan(checks.recipe_shape(config), sizes(config))]
