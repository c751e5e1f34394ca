"""Every place of verl, vLLM, Ray, torch, PEFT and transformers that is not public and that this package relies on.

`python -m tests.helpers.seams` prints those whose source differs from the recorded one (tests/contract/seams.json), and
`--write` records the source of the installed packages. A new version of a host is tried by scripts/check_hosts.sh.
"""

import ast
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "contract" / "seams.json"
HOSTS = ("verl", "vllm", "ray", "torch", "peft", "transformers")
MEANT_TO_BE_OVERRIDDEN = ("torch.nn.modules.module", "torch.nn.modules.linear", "torch.autograd.function")
# Functions of a host whose steps or rules this package repeats, and methods that it overrides in a class that it makes
# while it runs; and where.
COPIES = {
    "ray._private.runtime_env.context:RuntimeEnvContext.exec_worker": "verl_aqn/launch/forkserver/worker.py",
    "ray._private.utils:update_envs": "verl_aqn/launch/forkserver/worker.py",
    "transfer_queue.utils.zmq_utils:create_zmq_socket": "verl_aqn/integrations/verl/queue.py",
    "transformers.core_model_loading:revert_weight_conversion": "verl_aqn/checkpoints/naming.py",
    "verl.utils.tokenizer.chat_template:apply_chat_template": "verl_aqn/integrations/verl/rendering.py",
    "verl.trainer.main_ppo:TaskRunnerV1.run": "verl_aqn/launch/driver.py",
    "verl.trainer.main_ppo:TaskRunnerV1.init_agent_loop_manager": "verl_aqn/launch/driver.py",
    "verl.trainer.main_ppo:run_ppo": "verl_aqn/launch/driver.py",
    "verl.trainer.ppo.reward:get_custom_reward_fn": "verl_aqn/preflight/reward_function.py",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_ref_log_prob": "verl_aqn/integrations/verl/stock_trainer.py",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup": "verl_aqn/integrations/verl/micro_batches.py",
    "verl.utils.dataset.rl_dataset:RLHFDataset.__getitem__": "verl_aqn/preflight/run_data.py",
    "verl.utils.dataset.rl_dataset:RLHFDataset._read_files_and_tokenize": "verl_aqn/tasks/data_files.py",
    "verl.utils.distributed:initialize_global_process_group_ray": "verl_aqn/integrations/verl/process_group.py",
    "verl.utils.import_utils:load_module": "verl_aqn/preflight/reward_function.py",
    "verl.utils.vllm.utils:VLLMHijack.hijack": "verl_aqn/integrations/vllm/ask_vllm.py",
    "vllm.ir.ops.layernorm:fused_add_rms_norm": "verl_aqn/integrations/vllm/cpu_norm.py",
    "vllm.ir.ops.layernorm:rms_norm": "verl_aqn/integrations/vllm/cpu_norm.py",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts._select_experts": (
        "verl_aqn/integrations/vllm/cpu_moe.py"
    ),
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading": (
        "verl_aqn/integrations/vllm/cpu_moe.py"
    ),
    "vllm.model_executor.models.utils:WeightsMapper.get_unstacked_mapper": "verl_aqn/integrations/vllm/ask_vllm.py",
}
# The tests that fail if a seam of these files no longer does what the file expects; the longest match counts.
GUARDS = {
    "verl_aqn/bench": ["tests/integration/test_speed.py"],
    "verl_aqn/checkpoints": ["tests/unit/checkpoints"],
    "verl_aqn/integrations/verl": ["tests/contract/test_verl_seams.py"],
    "verl_aqn/integrations/verl/ask_tools.py": ["tests/contract/test_tools.py"],
    "verl_aqn/integrations/verl/ask_verl.py": ["tests/contract/test_verl_ask.py"],
    "verl_aqn/integrations/verl/checkpointing.py": ["tests/contract/test_verl_resume.py"],
    "verl_aqn/integrations/verl/groups.py": ["tests/contract/test_verl_sampling.py"],
    "verl_aqn/integrations/verl/kept_forward.py": ["tests/contract/test_kept_forward.py"],
    "verl_aqn/integrations/verl/keyed.py": ["tests/contract/test_verl_requests.py"],
    "verl_aqn/integrations/verl/left_out_rows.py": ["tests/contract/test_verl_rows.py"],
    "verl_aqn/integrations/verl/micro_batches.py": ["tests/contract/test_critic_batches.py"],
    "verl_aqn/integrations/verl/platform_cpu.py": ["tests/contract/test_process_group.py"],
    "verl_aqn/integrations/verl/process_group.py": ["tests/contract/test_process_group.py"],
    "verl_aqn/integrations/verl/queue.py": ["tests/contract/test_queue.py"],
    "verl_aqn/integrations/verl/rendering.py": ["tests/contract/test_verl_first_rows.py"],
    "verl_aqn/integrations/verl/rollout.py": ["tests/contract/test_verl_http.py", "tests/contract/test_verl_seams.py"],
    "verl_aqn/integrations/verl/root_cause.py": ["tests/contract/test_noted_errors.py"],
    "verl_aqn/integrations/verl/stock_trainer.py": ["tests/contract/test_stock_seams.py"],
    "verl_aqn/integrations/verl/stock_workers.py": ["tests/contract/test_stock_seams.py"],
    "verl_aqn/integrations/verl/sync.py": ["tests/contract/test_sync_socket.py", "tests/contract/test_sync_fault.py"],
    "verl_aqn/integrations/verl/validation.py": ["tests/contract/test_verl_validation.py"],
    "verl_aqn/integrations/vllm": ["tests/contract/test_vllm_seams.py"],
    "verl_aqn/integrations/vllm/ask_vllm.py": ["tests/contract/test_vllm_ask.py"],
    "verl_aqn/integrations/vllm/cpu_moe.py": ["tests/contract/test_vllm_moe.py"],
    "verl_aqn/integrations/vllm/cpu_sampler.py": ["tests/contract/test_vllm_sampler.py"],
    "verl_aqn/integrations/vllm/trace.py": ["tests/contract/test_vllm_trace.py"],
    "verl_aqn/launch/driver.py": ["tests/contract/test_verl_seams.py"],
    "verl_aqn/launch/forkserver": ["tests/contract/test_zygote.py"],
    "verl_aqn/models": ["tests/unit/models"],
    "verl_aqn/mxfp4": ["tests/unit/mxfp4"],
    "verl_aqn/mxfp4/sharding.py": ["tests/unit/mxfp4", "tests/unit/checkpoints/test_base_fsdp.py"],
    "verl_aqn/preflight/placing.py": ["tests/unit/preflight/test_placing.py"],
    "verl_aqn/preflight/reward_function.py": ["tests/contract/test_verl_rewards.py"],
    "verl_aqn/preflight/run_data.py": ["tests/contract/test_verl_first_rows.py"],
    "verl_aqn/tasks/data_files.py": ["tests/contract/test_verl_first_rows.py"],
}


def seams() -> dict[str, set[str]]:
    """Return each seam, as "module:name", and the files that rely on it.

    A seam is a private name of a host, an attribute of a host that is replaced, a method of a host's class that is
    overridden, or a function whose steps are repeated.
    """
    found: dict[str, set[str]] = {}
    classes: dict[str, Ours] = {}
    for file in sorted((ROOT / "verl_aqn").rglob("*.py")):
        path = str(file.relative_to(ROOT))
        tree = ast.parse(file.read_text())
        classes |= _classes(tree, path)
        for seam in _in_file(tree):
            found.setdefault(seam, set()).add(path)
    for name in classes:
        for path, seam in _overridden(name, classes):
            found.setdefault(seam, set()).add(path)
    for seam, path in COPIES.items():
        found.setdefault(seam, set()).add(path)
    return found


def guards_of(path: str) -> list[str]:
    """Return the tests that guard the seams of a file."""
    fits = [start for start in GUARDS if path == start or path.startswith(f"{start}/")]
    return GUARDS[max(fits, key=len)] if fits else []


def source_of(seam: str) -> str:
    """Return a digest of the seam's source, "absent" if the host lacks it, or "value" for what is no code.

    The source is read from the host's file, because this package may have replaced the function in this process.
    """
    module, _, name = seam.partition(":")
    try:
        thing: Any = importlib.import_module(module)
        file = thing.__file__ or ""
        for part in name.split("."):
            thing = getattr(getattr(thing, "__ray_actor_class__", thing), part)
    except (ImportError, AttributeError):
        return "absent"
    node: Any = ast.parse(Path(file).read_text()) if file.endswith(".py") else None
    for part in name.split("."):
        node = next((one for one in getattr(node, "body", ()) if getattr(one, "name", None) == part), None)
    if node is None:  # a table, a module, a C++ function, or a name that is imported from elsewhere
        return "value"
    for inner in ast.walk(node):  # without docstrings; comments are not part of the tree
        match getattr(inner, "body", None):
            case [ast.Expr(value=ast.Constant() as text), *_]:
                text.value = ""
    return hashlib.sha256(repr(_tree(node)).encode()).hexdigest()[:16]


def _tree(node: Any) -> Any:
    """Return a syntax tree as plain lists without empty fields, which differ between versions of Python."""
    if isinstance(node, list):
        return [_tree(one) for one in node]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _tree(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]


class Ours(NamedTuple):
    """A class of this package: its file, its methods, and the dotted names of its bases."""

    path: str
    methods: list[str]
    bases: list[str]


def _classes(tree: ast.Module, path: str) -> dict[str, Ours]:
    """Return the classes of a file by their dotted names."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = _imported(tree, (*HOSTS, "verl_aqn"))
    for node in tree.body:  # a class, or another name of one: `_Worker: Any = AgentLoopWorkerTQ.__ray_actor_class__`
        if isinstance(node, ast.ClassDef):
            names[node.name] = f"{module}.{node.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value and (same := _dotted(node.value, names)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: same for target in targets if isinstance(target, ast.Name)}
    return {
        f"{module}.{node.name}": Ours(
            path,
            [one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)],
            [base for one in node.bases if (base := _dotted(one, names))],
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def _imported(tree: ast.Module, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the names in a file that stand for something of `packages`, with their dotted names there."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in packages:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            for one in node.names:
                if (top := one.name.split(".")[0]) in packages:
                    names[one.asname or top] = one.name if one.asname else top
    return names


def _in_file(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of hosts in a file, and the attributes of hosts that it replaces."""
    names = _imported(tree, HOSTS)
    dotted = {name for name in names.values() if _private(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, names)) and _private(name):
            dotted.add(name)
        if isinstance(node, ast.Assign):
            dotted |= {name for target in node.targets if (name := _dotted(target, names))}
    longest = {name for name in dotted if not any(other.startswith(f"{name}.") for other in dotted)}
    yield from map(_split, longest)


def _private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the dotted name of a host that an expression stands for, or None."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def _overridden(name: str, classes: dict[str, Ours]) -> Iterator[tuple[str, str]]:
    """Yield (file, seam) for each method of a host that the class `name` or a parent of ours overrides.

    A mixin without a parent overrides the methods of the classes that it is mixed with.
    """
    ours, hosts, waiting = [], [], [name]
    while waiting:
        one = waiting.pop()
        if one in classes:
            ours.append(classes[one])
            waiting += classes[one].bases
        elif one.split(".")[0] in HOSTS:
            hosts.append(one)
    for base in hosts:
        module, _, rest = _split(base).partition(":")
        try:
            cls: Any = importlib.import_module(module)
            for part in rest.split("."):
                cls = getattr(cls, part)
        except (ImportError, AttributeError):
            yield classes[name].path, f"{module}:{rest}"
            continue
        for one in ours:
            for method in one.methods:
                owner = next((parent for parent in cls.__mro__ if method in vars(parent)), object)
                public = owner.__module__ in MEANT_TO_BE_OVERRIDDEN and method in ("__init__", "forward", "backward")
                if owner.__module__.split(".")[0] in HOSTS and not public:
                    yield one.path, f"{owner.__module__}:{owner.__qualname__}.{method}"


def _split(name: str) -> str:
    """Return "module:name" for a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return f"{'.'.join(parts[:end])}:{'.'.join(parts[end:])}".rstrip(":")
    return name


def read() -> dict[str, str]:
    """Return the recorded digest of each seam's source."""
    return json.loads(RECORD.read_text())


def main(write: bool) -> int:
    """Print the seams that changed, with the files that rely on them and their guards; return how many there are."""
    found, recorded = seams(), read() if RECORD.exists() else {}
    now = {seam: source_of(seam) for seam in sorted(found)}
    if write:
        RECORD.write_text(json.dumps(now, indent=1) + "\n")
    changed = [seam for seam in now if recorded.get(seam) != now[seam]]
    for seam in changed:
        print(f"{'new' if seam not in recorded else now[seam] if now[seam] == 'absent' else 'changed'}  {seam}")
        for path in sorted(found[seam]):
            print(f"         {path}  guarded by {' '.join(guards_of(path))}")
    for seam in sorted(recorded.keys() - now.keys()):
        print(f"unused   {seam}")
    print(f"{len(now)} seams, {len(changed)} with another source than recorded", file=sys.stderr)
    return len(changed)


if __name__ == "__main__":
    sys.exit(bool(main("--write" in sys.argv[1:])) and "--write" not in sys.argv[1:])
