"""The import rules between packages, read from the source: who imports which package, and who imports a host."""

import sys
import tomllib
from pathlib import Path

from verl_aqn import cache

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = {
    one["id"]: one for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}
# Our modules that a package may import, also inside functions: the table of packages, and small shared modules
# (adapter, boxes, cache, checksums, digest, order, owned, shards, stacks, stock_settings, trackers). All may import
# `errors`.
ARROWS = {
    "schedule": (),
    "order": (),
    "digest": (),
    "boxes": (),
    "shards": ("boxes",),
    "cache": (),
    "stacks": (),
    "faults": ("runs", "watchdog"),
    "cause": (),
    "checksums": ("cache",),
    "judge": ("order",),  # names in records, without torch: for the trainer and for reports
    "data": ("rewards",),  # the rule that the ground truths are for
    "rewards": ("config", "runs"),  # runs: what a right answer is
    "owned": (),
    "runs": ("checksums", "config", "judge", "order", "owned", "schedule", "stock_settings"),
    "trackers": ("cache",),
    # names of trackers and keys, to reject others
    "config": ("order", "overrides", "schedule", "trackers", "verl_keys"),
    "verl_keys": (),
    "convert": ("config", "verl_keys"),
    "adapter": ("digest",),
    # ascend: whose operators to use; data: texts to calibrate on
    "mxfp4": ("adapter", "ascend", "cache", "checksums", "data", "order", "owned", "shards"),
    "noise": ("digest", "judge", "mxfp4", "order", "shards"),  # noise is added to the codes of packed layers
    "vllm_api": ("adapter", "boxes", "digest", "faults", "mxfp4", "noise", "shards", "stacks"),
    "report": ("judge", "order", "runs", "__version__"),
}
# Who imports packages that are not installed with the core, also inside functions.
HOSTS = {
    "verl": ("verl_api", "bench/stock.py", "zygote/server.py"),  # stock verl to compare with; imported before the fork
    "transfer_queue": ("verl_api",),
    "tensordict": (),
    "ray": ("verl_api", "cluster", "preflight/node.py", "zygote/server.py"),
    "vllm": ("vllm_api",),
    "vllm_ascend": ("vllm_api", "ascend.py"),  # to find out which chip it was built for
}
WITHOUT_HOSTS = (
    "schedule",
    "judge",
    "judge",
    "noise",
    "mxfp4",
    "runs",
    "config",
    "data",
    "rewards",
    "vllm_api.readback",
)


@cache
def imports(path: Path, within_functions: bool = True) -> frozenset[str]:
    """Return the dotted names that a file imports, without those for type checkers only."""
    found, todo = set(), [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not within_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return frozenset(found)


def test_every_contract_of_imports_holds(tmp_path):
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout


def test_every_module_is_in_a_room():
    layers = {name.strip() for layer in CONTRACTS["rooms"]["layers"] for name in layer.split("|")}
    for path in sorted((ROOT / "verl_aqn").rglob("*.py")):
        parts = path.relative_to(ROOT / "verl_aqn").with_suffix("").parts
        if parts[-1] != "__init__":
            assert {parts[0], ".".join(parts[:2])} & layers, path


def test_files_have_names_of_their_own():
    """Two files of one name with different jobs are hard to find. The hosts' plugins and packages are exempt."""
    names = [path.stem for path in (ROOT / "verl_aqn").rglob("*.py") if not path.stem.startswith("__")]
    twice = {name for name in names if names.count(name) > 1}
    # The public names of `verl_aqn.noise.schedule` and `verl_aqn.tasks.gsm8k` are those of the files behind them.
    assert twice <= {"schedule", "gsm8k"}


def test_the_core_is_imported_without_a_host():
    """No module that the core imports even names a host inside a function."""
    todo = [name for name in FILES if name.startswith(tuple(f"verl_aqn.{start}" for start in WITHOUT_HOSTS))]
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        assert hosts_in(FILES[name]) <= {"vllm_ascend"}, name
        for other in (name, *imports(FILES[name], within_functions=False)):
            parts = other.split(".")
            todo += [start for n in range(len(parts)) if (start := ".".join(parts[: n + 1])) in FILES]
