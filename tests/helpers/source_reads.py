"""Find what is read from configs on the path of a run: in the installed verl, and in this package.

The source is only parsed. A read counts if

- its file is reached by imports from `STARTS`, without the engines, rollouts and trainers that no run uses,
- its function and its class are mentioned by name in other reached code, and this package does not override the
  function without `super()`.

What only checks a value does not count, because it has no effect on a run: functions named `validate`, and in a
`__post_init__` the conditions, assertions and errors.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The processes of a run begin here.
STARTS = (
    "verl.trainer.main_ppo", "verl.trainer.ppo.v1.trainer_sync", "verl.trainer.ppo.v1.agent_loop_tq",
    "verl.workers.engine_workers", "verl.workers.engine.fsdp.transformer_impl",
    "verl.workers.rollout.vllm_rollout.vllm_async_server", "verl.experimental.agent_loop.tool_agent_loop",
    "verl.experimental.agent_loop.single_turn_agent_loop", "verl.experimental.reward_loop.reward_loop",
    "transfer_queue.interface", "transfer_queue.storage.simple_storage",
    "transfer_queue.storage.bootstrap.simple_storage_bootstrap",
    "transfer_queue.storage.bootstrap.mooncake_bootstrap", "transfer_queue.storage.clients.mooncake_client",
)  # fmt: skip
# Parts of module names: other engines, rollouts and trainers.
ELSEWHERE = (
    "megatron", "mcore", "veomni", "torchtitan", "automodel", "mindspeed", "sglang", "trtllm", "fully_async",
    "one_step_off", "separation", "tinker", "sft_trainer", "main_ppo_v0", "model_merger", "hf_rollout", "third_party",
    "trainer_colocate_async", "trainer_separate_async", "teacher_loop", "distillation", "fsdp_turbo_impl",
    "vllm_pd_replica", "delta", "hccl_", "kimi_check", "mooncake_check", "nccl_check", "nixl_check", "modelopt",
    "qat", "prefix_grouper",
)  # fmt: skip
OURS = ("verl_aqn/integrations/verl", "verl_aqn/integrations/vllm", "verl_aqn/launch/driver.py")
NOT_OURS = ("stock_", "engine_probe.py")  # they run verl's own trainer, without a recipe
PACKAGES = ("verl", "transfer_queue")
CHECKS = ("validate", "validate_config")
_SAME = ("omega_conf_to_dataclass", "to_container", "deepcopy", "create", "dict", "instantiate", "list")

Chain = tuple[str, ...]


@dataclass(eq=False)
class Unit:
    """A function, or the code of a module outside of functions."""

    module: str
    name: str
    owner: str
    node: ast.AST
    root: bool
    mentions: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Read:
    """An expression that reads a name of something: `chain` is ("self", "config", "rollout", "n")."""

    chain: Chain
    module: str
    scope: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.module}:{self.line}"


@cache
def _site() -> Path:
    spec = find_spec("verl")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent


def _file_of(module: str) -> Path | None:
    path = _site() / Path(*module.split("."))
    return next((one for one in (path / "__init__.py", path.with_suffix(".py")) if one.is_file()), None)


def modules() -> dict[str, ast.Module]:
    """Return the parsed modules on the path: name → tree."""
    found: dict[str, ast.Module] = {}
    waiting = list(STARTS)
    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in found or file is None or any(word in name for word in ELSEWHERE):
            continue
        found[name] = tree = ast.parse(file.read_text(encoding="utf-8"))
        parts = name.split(".")
        waiting += [".".join(parts[:count]) for count in range(1, len(parts))]
        package = parts if file.name == "__init__.py" else parts[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [one.name for one in node.names if one.name.split(".")[0] in PACKAGES]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                if base.split(".")[0] in PACKAGES:
                    waiting += [base, *(f"{base}.{one.name}" for one in node.names)]
    for place in OURS:
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).glob("*.py"))
        for file in files:
            if not file.name.startswith(NOT_OURS):
                found[".".join(file.relative_to(ROOT).with_suffix("").parts)] = ast.parse(file.read_text())
    return found


class _Split(ast.NodeVisitor):
    """Split a module into units, and collect its classes."""

    def __init__(self, module: str):
        self.module, self.owners = module, [""]
        self.units = [Unit(module, "", "", ast.Module([], []), root=True)]
        self.classes: dict[str, ast.ClassDef] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes[node.name] = node
        if any("register" in ast.unparse(one) for one in node.decorator_list):
            self.units[0].mentions.add(node.name)
        for base in (*node.bases, *node.decorator_list):
            self._mention(base)
        self.owners.append(node.name)
        for child in node.body:
            self.visit(child)
        self.owners.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        registered = any(isinstance(one, ast.Call) and "register" in ast.unparse(one) for one in node.decorator_list)
        unit = Unit(self.module, node.name, self.owners[-1], node, root=registered and not self.owners[-1])
        self._mention(node, unit)
        self.units.append(unit)

    visit_AsyncFunctionDef = visit_FunctionDef

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Module):
            self._mention(node)
            for child in ast.walk(node):  # functions and classes within `if` and `try`
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    self.visit(child)
        else:
            super().generic_visit(node)

    def _mention(self, node: ast.AST, unit: Unit | None = None) -> None:
        unit = unit or self.units[0]
        if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets[0]):
            return
        unit.mentions |= set(_mentioned(node))
        if unit is self.units[0]:
            cast = unit.node
            assert isinstance(cast, ast.Module)
            if isinstance(node, ast.stmt):
                cast.body.append(node)


def _mentioned(node: ast.AST) -> Iterator[str]:
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            yield one.id
        elif isinstance(one, ast.Attribute):
            yield one.attr
        elif isinstance(one, ast.alias) and one.asname:
            yield one.name
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield from (one.value,) if one.value.isidentifier() else ()


class Reads:
    """All reads on the path of a run."""

    def __init__(self, classes: set[str]) -> None:
        """`classes`: the names of classes that are built from a config, and therefore reached."""
        self.built = classes
        self.units: list[Unit] = []
        self._meanings: dict[str, dict[str, Chain]] = {}
        self.classes: dict[str, tuple[str, ast.ClassDef]] = {}
        for name, tree in modules().items():
            split = _Split(name)
            split.visit(tree)
            self.units += split.units
            self.classes |= {key: (name, node) for key, node in split.classes.items() if key not in self.classes}
        self.reads = [read for unit in self._reached() for read in self._in_unit(unit)]

    # Which functions a run can reach

    def _reached(self) -> list[Unit]:
        replaced = self._replaced()
        known = set(self.built)
        reached: list[Unit] = []
        waiting = [unit for unit in self.units if (unit.owner, unit.name) not in replaced and unit.name not in CHECKS]
        found = [unit for unit in waiting if unit.root or unit.module.startswith("verl_aqn.")]
        while found:
            reached += found
            for unit in found:
                known |= unit.mentions
            waiting = [unit for unit in waiting if unit not in found]
            found = [unit for unit in waiting if self._is_mentioned(unit, known)]
        return reached

    @staticmethod
    def _is_mentioned(unit: Unit, known: set[str]) -> bool:
        return (not unit.owner or unit.owner in known) and (unit.name.startswith("__") or unit.name in known)

    def _replaced(self) -> set[tuple[str, str]]:
        """Return (class, method) of verl that this package overrides without calling it."""
        found: set[tuple[str, str]] = set()
        for module, node in self.classes.values():
            if not module.startswith("verl_aqn."):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.unparse(method)
                    if f".{method.name}(" not in text.replace(f"self.{method.name}(", ""):
                        found |= {(base, method.name) for base in self._bases(node)}
        return found

    def _bases(self, node: ast.ClassDef) -> Iterator[str]:
        for base in node.bases:
            name = ast.unparse(base).split(".")[-1]
            if name in self.classes:
                yield name
                yield from self._bases(self.classes[name][1])

    # What a function reads

    def _in_unit(self, unit: Unit) -> Iterator[Read]:
        scope = _Scope(self._of_self(unit.owner))
        scope.assign(unit.node)
        nodes = _without_checks(unit.node) if unit.name == "__post_init__" else ast.walk(unit.node)
        for node in nodes:
            chain = scope.chain(node) if isinstance(node, ast.Attribute | ast.Subscript | ast.Call) else ()
            if len(chain) > 1 and not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
                yield Read(chain, unit.module, f"{unit.owner}.{unit.name}", node.lineno)  # type: ignore[attr-defined]

    def _of_self(self, owner: str) -> dict[str, Chain]:
        """Return what `self.x` stands for in a class: {"self.x": chain}."""
        if owner in self._meanings or owner not in self.classes:
            return self._meanings.get(owner, {})
        node = self.classes[owner][1]
        found: dict[str, Chain] = {}
        for base in self._bases(node):
            found |= self._of_self(base)
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                scope = _Scope(found)
                scope.assign(method)
                found |= {name: chain for name, chain in scope.names.items() if name.startswith("self.")}
        self._meanings[owner] = found
        return found


def _without_checks(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.Assert | ast.Raise) or (isinstance(node, ast.If) and name == "test"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _without_checks(child)


class _Scope:
    """What the names of a function stand for."""

    def __init__(self, names: dict[str, Chain]):
        self.names = dict(names)

    def assign(self, node: ast.AST) -> None:
        for one in ast.walk(node):
            pairs: list[tuple[ast.expr, ast.expr | None]] = []
            if isinstance(one, ast.Assign):
                pairs = [(target, one.value) for target in one.targets]
            elif isinstance(one, ast.AnnAssign | ast.NamedExpr):
                pairs = [(one.target, one.value)]
            for target, value in pairs:
                name = ast.unparse(target)
                chain = self.chain(value) if value is not None else ()
                a_field = name.startswith("self.") and len(chain) == 2 and chain[0] == "self"
                if re.fullmatch(r"(self\.)?\w+", name) and len(chain) > 1 and chain[-1] != name and not a_field:
                    self.names.setdefault(name, chain)

    def chain(self, node: ast.AST) -> Chain:
        """Return the names of an expression, or () if it is not a chain of names."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, (name,))
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self.names.get(f"self.{name}", ("self", name))
            case ast.Attribute(value=value, attr=name):
                return (*found, name) if (found := self.chain(value)) else ()
            case ast.Subscript(value=value, slice=ast.Constant(value=str(name))):
                return (*found, name) if (found := self.chain(value)) else ()
            case ast.Call(
                func=ast.Attribute(value=value, attr="get" | "pop"), args=[ast.Constant(value=str(name)), *_]
            ):
                return (*found, name) if (found := self.chain(value)) else ()
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return (*found, name) if (found := self.chain(value)) else ()
            case ast.Call(
                func=ast.Name(id="_get_attr"), args=[ast.Constant(value=str(name)), *_]
            ):  # of verl's wrap policy
                return ("config", name)
            case ast.Call(func=ast.Attribute(attr="select"), args=[value, ast.Constant(value=str(name)), *_]):
                return (*found, *name.split(".")) if (found := self.chain(value)) else ()
            case ast.Call(func=function, args=[value, *_]) if ast.unparse(function).split(".")[-1] in _SAME:
                return self.chain(value)
            case ast.BoolOp(values=[value, *_]) | ast.IfExp(body=value) | ast.Await(value=value):
                return self.chain(value)
        return ()
