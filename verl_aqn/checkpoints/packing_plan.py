"""The plan of a quantisation: which tensors are packed, and the names of all tensors, from the model's structure."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from verl_aqn.checkpoints.building import build, stays_float32
from verl_aqn.checkpoints.loading import check_names
from verl_aqn.checkpoints.naming import Naming, is_merged
from verl_aqn.checkpoints.promises import check_ties
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4.codec import BLOCK
from verl_aqn.mxfp4.experts import STACKS, in_one_stack, is_fused, why_not_packable
from verl_aqn.mxfp4.fused import fused_groups
from verl_aqn.mxfp4.names import ROLES, Expert, parts_in

EXCLUDE = ("lm_head", "embed_tokens")
# Names of routers, in addition to those that `routers` finds by shape. A rounding error in a router can select another
# expert. vLLM builds all routers without quantisation, so they must be in the ignore list, also if transformers does
# not build them as nn.Linear.
ROUTERS = (
    "*.mlp.gate",  # Qwen, Mixtral, GLM, DeepSeek
    "*.router",  # gpt-oss, Llama 4, Jamba
    "*.router.layer",  # Granite MoE, DBRX
    "*.router.classifier",  # LongCat
    "*.shared_expert_gate",  # Qwen: weighs the shared expert
)


class Piece(NamedTuple):
    """A matrix that becomes one packed module, and its place in the source."""

    module: str
    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    """Index into a fused stack."""
    half: int = 0
    """Index of the half of the rows, for gate and up in one stack."""
    transposed: bool = False
    """Whether the source stores a stack [E, N, K] as [E, K, N]."""

    def read(self, weights: Weights) -> Tensor:
        """Read the matrix [N, K] or the stack [E, N, K]."""
        if len(self.shape) == 3:
            stack = weights.read(self.tensor)
            return stack.transpose(1, 2).contiguous() if self.transposed else stack
        rows = self.shape[0]
        return weights.read(self.tensor, self.expert)[self.half * rows : (self.half + 1) * rows]


class Plan(NamedTuple):
    pieces: list[Piece]
    ignored: list[str]
    """Linear layers, routers and experts that are not packed, by their names in the packed checkpoint."""
    kept: dict[str, str]
    """Tensors of the source that are not packed, with their names in the packed checkpoint."""
    exact: set[str]
    """Those of `kept` that keep their dtype."""


def make_plan(src: Path, weights: Weights, exclude: tuple[str, ...]) -> Plan:
    """Plan to pack every ``nn.Linear`` and fused expert except the output head, routers, and modules in ``exclude``.

    Raises:
        ModelError: the tensors are not those of the model in config.json, or a layer does not fit MXFP4.
        ConfigError: an entry of ``exclude`` matches nothing, only some experts of a layer, or only some of the layers
            that vLLM fuses into one.
    """
    built = build(src)
    model, naming = built.model, Naming(built, weights.specs)
    sources = naming.sources(weights.specs)
    check_names(model, naming, sources, src)
    modules = dict(model.named_modules())
    experts = {name: list(_experts(name, module)) for name, module in modules.items() if is_fused(module)}
    gates = routers(model)
    known = [
        *modules,
        *map(naming.in_checkpoint, modules),
        *(naming.of_expert(e) for of_module in experts.values() for e in of_module),
    ]
    for pattern in exclude:
        if pattern not in EXCLUDE and not any(matches(name, pattern) for name in known):
            raise ConfigError(f"exclude has {pattern!r}, which matches no module of {type(model).__name__}")

    pieces: list[Piece] = []
    ignored: list[str] = []
    for name, module in modules.items():
        out = naming.in_checkpoint(name)
        router = name in gates
        kept = (
            router
            or module is model.get_output_embeddings()
            or any(excludes(p, n) for n in (name, out) for p in exclude)
        )
        if name in experts:
            # vLLM looks for gate_proj, up_proj and down_proj, also if the checkpoint has other names.
            if _excluded(name, [naming.of_expert(expert) for expert in experts[name]], exclude):
                ignored += [f"{out}.{expert.number}.{expert.role}" for expert in experts[name]]
                continue
            if fault := why_not_packable(module):
                raise ModelError(f"{name} of {src}: {type(module).__name__} cannot be packed ({fault}): exclude it")
            pieces += _expert_pieces(name, module, experts[name], naming, sources, src)
        elif _has_stacks(module):
            if not any(excludes(pattern, name) for pattern in exclude):
                raise ModelError(
                    f"{name} of {src} ({type(module).__name__}) has matrices in a layout that cannot be packed: "
                    f"exclude {name.rpartition('.')[0]}"
                )
            ignored.append(f"re:{re.escape(naming.in_checkpoint(name.rpartition('.')[0]))}\\..*")
        elif kept and (router or isinstance(module, nn.Linear)):
            ignored.append(out)
        elif isinstance(module, nn.Linear):
            if name + ".weight" in naming.converters or len(sources[name + ".weight"]) != 1:
                raise ModelError(f"{src} stores {out} in another layout than {type(model).__name__} uses: exclude it")
            (tensor,) = sources[name + ".weight"]
            out = naming.kept_name(tensor).removesuffix(".weight")
            pieces.append(Piece(out, tensor, (module.out_features, module.in_features)))
    for piece in pieces:
        _check(src, weights, piece)
    _check_widths(src, pieces)
    _check_groups([piece.module for piece in pieces], ignored)
    check_ties(model, sources, weights, src)
    if not pieces:
        raise ModelError(f"{src} ({type(model).__name__}) has no linear layer to quantise with exclude {list(exclude)}")
    used = {piece.tensor for piece in pieces}
    keep = {name: naming.kept_name(name) for name in weights.specs if name not in used}
    exact = {name for name in keep if stays_float32(model, naming.in_model(name))}
    return Plan(pieces, [*ignored, *of_other_parts(naming, weights)], keep, exact)


def routers(model: nn.Module) -> set[str]:
    """Return the names of a model's routers.

    These are the modules with a name in `ROUTERS`, and the modules beside fused experts whose matrix [N, K] has one row
    per expert, or a single row.
    """
    modules = dict(model.named_modules())
    found = {name for name in modules if any(matches(name, pattern) for pattern in ROUTERS)}
    for name, module in modules.items():
        if is_fused(module):
            block = name.rpartition(".")[0]
            rows = {1, len(module.get_parameter("down_proj"))}
            for other, beside in modules.items():
                weight = getattr(beside, "weight", None)
                if other.startswith(f"{block}.") and isinstance(weight, nn.Parameter) and weight.dim() == 2:
                    found |= {other} if len(weight) in rows else set()
    return found


def _has_stacks(module: nn.Module) -> bool:
    """Return whether ``module`` itself has stacks of matrices that are neither convolutions nor known experts."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def matches(name: str, pattern: str) -> bool:
    """Return whether ``pattern`` is a module's full name, the last parts of it, or a ``*`` pattern that matches it."""
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def excludes(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` matches (`matches`) the module ``name`` or a module that contains it."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _experts(name: str, module: nn.Module) -> Iterator[Expert]:
    for number in range(len(module.get_parameter("down_proj"))):
        for role in ROLES:
            yield Expert(name, number, role)


def _excluded(module: str, names: list[str], exclude: tuple[str, ...]) -> bool:
    """Return whether ``exclude`` contains all experts of a layer.

    Raises:
        ConfigError: ``exclude`` contains only some of them.
    """
    if any(excludes(pattern, module) for pattern in exclude):
        return True
    excluded = [any(excludes(pattern, name) for pattern in exclude) for name in names]
    if any(excluded) and not all(excluded):
        raise ConfigError(
            f"exclude has some experts of {module} ({names[excluded.index(True)]}) but not all: in vLLM all experts of "
            f"a layer have the same precision; exclude {module} or none of them"
        )
    return all(excluded)


def _expert_pieces(
    name: str, module: nn.Module, experts: list[Expert], naming: Naming, sources: dict[str, list[str]], src: Path
) -> list[Piece]:
    """Return the pieces of a layer's experts: one per matrix, or two stacks if the layout keeps experts together."""
    foreign = [s for s in STACKS if f"{name}.{s}" in naming.converters and not _merged(naming, f"{name}.{s}")]
    if foreign:
        raise ModelError(f"{src} stores {name}.{foreign[0]} in another layout than transformers uses: exclude {name}")
    if not in_one_stack(module):
        return [_expert_piece(expert, module, naming, sources) for expert in experts]
    pieces = []
    for stack in STACKS:
        e, n, k = getattr(module, stack).shape
        (tensor,) = sources[f"{name}.{stack}"]
        shape = (e, k, n) if module.is_transposed else (e, n, k)
        pieces.append(Piece(naming.kept_name(tensor), tensor, shape, transposed=bool(module.is_transposed)))
    return pieces


def _merged(naming: Naming, stack: str) -> bool:
    return is_merged(naming.converters[stack][0])


def of_other_parts(naming: Naming, weights: Weights) -> list[str]:
    """Return the modules with a matrix in the other parts of a multimodal folder; they are not packed.

    vLLM may build any of them as a linear layer, even one that is a convolution in transformers.
    """
    modules = (name.removesuffix(".weight") for name in naming.passed if name.endswith(".weight"))
    return sorted(module for module in modules if len(weights.specs[module + ".weight"].shape) > 1)


def _expert_piece(expert: Expert, module: nn.Module, naming: Naming, sources: dict[str, list[str]]) -> Piece:
    stack, half = ROLES[expert.role]
    _, rows, k = getattr(module, stack).shape
    shape = (rows // parts_in(stack), k)
    out = naming.of_expert(expert)
    if out + ".weight" in sources[f"{expert.module}.{stack}"]:
        return Piece(out, out + ".weight", shape)
    (tensor,) = sources[f"{expert.module}.{stack}"]
    return Piece(out, tensor, shape, expert.number, half)


def _check(src: Path, weights: Weights, piece: Piece) -> None:
    spec = weights.specs[piece.tensor]
    *lead, n, k = piece.shape
    expected: tuple[int, ...] = (*lead, k, n) if piece.transposed else piece.shape
    if piece.expert is not None:
        expected = (spec.shape[0], parts_in(piece.tensor.rpartition(".")[2]) * n, k)
    if spec.shape != expected or not spec.dtype.is_floating_point:
        raise ModelError(
            f"tensor {piece.tensor} of {weights.file_of(piece.tensor)} is {spec.dtype} {list(spec.shape)}, but "
            f"config.json asks for {list(expected)}: weights and config.json are not of the same model"
        )


def _check_widths(src: Path, pieces: list[Piece]) -> None:
    """Check that MXFP4 supports the number of inputs of each layer.

    Raises:
        ModelError: a layer has another number of inputs; the message names all layers to exclude.
    """
    wrong = [piece for piece in pieces if piece.shape[-1] % BLOCK]
    if wrong:
        leaves = {_leaf(piece.module) for piece in wrong}
        fitting = {_leaf(piece.module) for piece in pieces if piece not in wrong}
        exclude = [piece.module for piece in wrong] if leaves & fitting else sorted(leaves)
        raise ModelError(
            f"{wrong[0].module} of {src} has {wrong[0].shape[-1]} inputs, but MXFP4 needs a multiple of {BLOCK}: "
            f"exclude it ({' '.join(f'--exclude {name}' for name in exclude[:8])})"
        )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _check_groups(packed: list[str], ignored: list[str]) -> None:
    """Check that layers that vLLM fuses into one are all packed or all excluded.

    Raises:
        ConfigError: only some layers of a group are packed.
    """
    left = set(ignored)
    for group in fused_groups([*packed, *ignored]):
        kept = [name for name in group if name in left]
        if kept and len(kept) < len(group):
            names = sorted(_leaf(name) for name in group)
            raise ConfigError(
                f"exclude keeps {kept[0]} in 16 bits but not all of {', '.join(names)}, which vLLM fuses into one "
                f"layer: exclude all of them ({' '.join(f'--exclude {name}' for name in names)}) or none"
            )
