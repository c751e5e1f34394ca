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
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "contract" / "seams.json"
HOSTS = ("verl", "vllm", "ray", "torch", "peft", "transformers")
MEANT_TO_BE_OVERRIDDEN = ("torch.nn.modules.module", "torch.nn.modules.linear", "torch.autograd.function")
# Functions of a host whose steps this package repeats, and where.
COPIES = {
    "verl.trainer.main_ppo:TaskRunnerV1.run": "verl_aqn/launch/driver.py",
    "verl.trainer.main_ppo:TaskRunnerV1.init_agent_loop_manager": "verl_aqn/launch/driver.py",
    "verl.trainer.main_ppo:run_ppo": "verl_aqn/launch/driver.py",
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
    "verl_aqn/integrations/verl/keyed.py": ["tests/contract/test_verl_requests.py"],
    "verl_aqn/integrations/verl/left_out_rows.py": ["tests/contract/test_verl_rows.py"],
    "verl_aqn/integrations/verl/platform_cpu.py": ["tests/contract/test_process_group.py"],
    "verl_aqn/integrations/verl/rollout.py": ["tests/contract/test_verl_http.py", "tests/contract/test_verl_seams.py"],
    "verl_aqn/integrations/verl/root_cause.py": ["tests/contract/test_noted_errors.py"],
    "verl_aqn/integrations/verl/stock_trainer.py": ["tests/contract/test_stock_seams.py"],
    "verl_aqn/integrations/verl/stock_workers.py": ["tests/contract/test_stock_seams.py"],
    "verl_aqn/integrations/verl/sync.py": ["tests/contract/test_sync_socket.py", "tests/contract/test_sync_fault.py"],
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
}


def seams() -> dict[str, set[str]]:
    """Return each seam, as "module:name", and the files that rely on it.

    A seam is a private name of a host, an attribute of a host that is replaced, a method of a host's class that is
    overridden, or a function whose steps are repeated.
    """
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "verl_aqn").rglob("*.py")):
        path = str(file.relative_to(ROOT))
        for seam in _in_file(file):
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
            thing = getattr(thing, part)
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


def _in_file(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    names: dict[str, str] = {}  # name in the file → dotted name of the host
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in HOSTS:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            for one in node.names:
                if (top := one.name.split(".")[0]) in HOSTS:
                    names[one.asname or top] = one.name if one.asname else top
    dotted = {name for name in names.values() if _private(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, names)) and _private(name):
            dotted.add(name)
        if isinstance(node, ast.Assign):
            dotted |= {name for target in node.targets if (name := _dotted(target, names))}
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (name := _dotted(base, names)) is not None:
                    yield from _overridden(name, node)
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


def _overridden(base: str, ours: ast.ClassDef) -> Iterator[str]:
    """Yield the methods of the host's class `base` and its parents that a class of ours overrides."""
    module, _, name = _split(base).partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        yield f"{module}:{name}"
        return
    for method in ours.body:
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            owner = next((one for one in cls.__mro__ if method.name in vars(one)), object)
            public = owner.__module__ in MEANT_TO_BE_OVERRIDDEN and method.name in ("__init__", "forward", "backward")
            if owner.__module__.split(".")[0] in HOSTS and not public:
                yield f"{owner.__module__}:{owner.__qualname__}.{method.name}"


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
