"""Names of a model's tensors: in its folder, and in the model that transformers builds.

transformers renames and fuses tensors when it loads a folder. Its own tables say how
(``transformers.conversion_mapping``); they are asked for each name of the folder, and the answers are kept in both
directions. A packed folder keeps its source's names:

==============================================  =====================================================
in a checkpoint, and in stock vLLM              in the model that transformers builds
==============================================  =====================================================
``P.mlp.experts.3.gate_proj.weight``            rows 0..I of ``P.mlp.experts.gate_up_proj[3]`` [2I, H]
``P.mlp.experts.3.up_proj.weight``              rows I..2I of it
``P.mlp.experts.3.down_proj.weight``            ``P.mlp.experts.down_proj[3]`` [H, I]
``P.block_sparse_moe.experts.3.w1.weight``      as gate_proj, ``w3`` as up_proj, ``w2`` as down_proj (Mixtral)
``P.mlp.experts.gate_up_proj`` [E, H, 2I]       the same (gpt-oss: transposed, gate and up interleaved)
``backbone.layers.0.mixer.in_proj.weight``      ``model.layers.0.mixer.in_proj.weight`` (Nemotron-H)
``language_model.model.layers.0.…``             ``model.layers.0.…`` (the text part of a multimodal folder)
==============================================  =====================================================

Packed ones have ``.weight_packed`` and ``.weight_scale`` for ``.weight`` on the left (a stack ``S`` of gpt-oss:
``S.weight_packed``), and on the right ``_packed`` and ``_scale`` after the name of a linear layer's weight or of a
fused stack (`verl_aqn.mxfp4.experts.Mxfp4Experts`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from verl_aqn.checkpoints.building import Built, build, text_prefixes
from verl_aqn.checkpoints.storage import Weights, has_weights
from verl_aqn.mxfp4.names import _EXPERT, _SUFFIXES, ROLES, Expert

_PEFT = "base_model.model."  # the prefix that PEFT adds to every name


class Naming:
    """The mapping between the tensor names of one folder and those of its model.

    ``built`` holds the models of the folder, and ``names`` are its tensors. Without ``names`` the tensor names of the
    model are used.
    """

    def __init__(self, built: Built, names: Iterable[str] = ()):
        self._expert: dict[str, Expert] = {}  # by a checkpoint's module name
        self._tensor: dict[str, str] = {}  # checkpoint's tensor: model's tensor
        self._modules: dict[str, str] = {}  # model's module: checkpoint's module
        self.converters: dict[str, tuple[Any, dict[str, str]]] = {}
        """By tensor of the model: the converter of transformers that makes it, and the pattern of the converter that
        each of the checkpoint's tensors matches."""
        self._kept: dict[str, str] = {}
        self.passed: set[str] = set()
        """The folder's tensors that do not belong to the text part: of a vision tower or a projector."""
        table = _Table(built)
        self._leaves = table.leaves()
        names = sorted(names) or list(table.state)
        for name in names:
            self._learn(name, table)
        stacks = {n.rpartition(".")[0] for n in built.model.state_dict() if n.endswith(".experts.down_proj")}
        back = {theirs: ours for ours, theirs in self._modules.items()}
        for name in names:  # experts of a model without a conversion table, named as `of_expert` names them
            match = _EXPERT.fullmatch(_module(name) or "")
            module = back.get(match[1], match[1]) if match else ""
            if match and name not in self._tensor and module in stacks and match[3] in self._leaves.values():
                role = next(role for role, leaf in self._leaves.items() if leaf == match[3])
                self._add_expert(name, Expert(module, int(match[2]), role))

    @classmethod
    def of_folder(cls, path: str | Path) -> Self:
        """Return the names of a packed or unpacked folder; without weights, the names that transformers would save.

        Raises:
            ModelError: the folder cannot be read, or transformers cannot build its model.
        """
        path = Path(path)
        return cls(build(path), Weights(path).specs if has_weights(path) else ())

    @classmethod
    def of_model(cls, model: Any) -> Self:
        """Return the names under which transformers would save a text model that it has built itself."""
        return cls(Built(model, model))

    def expert(self, name: str) -> Expert | None:
        """Return the expert matrix that a tensor or module name of a checkpoint refers to; None for other names."""
        return self._expert.get(name) or self._expert.get(_module(name) or "")

    def in_model(self, name: str) -> str:
        """Return the tensor of the model that contains a checkpoint's tensor, or the given name if there is none."""
        return self._tensor.get(name, name)

    def in_checkpoint(self, name: str) -> str:
        """Return the checkpoint's name of a tensor or module of the model that is not a fused expert."""
        return _renamed(name, self._modules)

    def adapter_name(self, name: str) -> str:
        """Return the name that vLLM reads for the PEFT tensor ``name``: it uses the module's name in the folder."""
        module = name.removeprefix(_PEFT)
        return name.removesuffix(module) + self.in_checkpoint(module)

    def of_expert(self, expert: Expert) -> str:
        """Return the module name of an expert's matrix in the checkpoint."""
        return f"{self.in_checkpoint(expert.module)}.{expert.number}.{self._leaves[expert.role]}"

    def kept_name(self, name: str) -> str:
        """Return the name in a packed folder of a source tensor that is not packed.

        This is the name in the source, or the name on the hub if the source uses the names of transformers.
        """
        return self._kept.get(name, name)

    def module_in_model(self, name: str) -> str:
        """Return the module of the model for a packed module of the checkpoint that is not an expert's matrix."""
        return self.in_model(name + ".weight_packed").removesuffix("_packed").removesuffix(".weight")

    def sources(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return for every tensor of the model the tensors of the checkpoint that it is made of."""
        made_of: dict[str, list[str]] = {}
        for name in names:
            if name not in self.passed:
                made_of.setdefault(self.in_model(name), []).append(name)
        for target, (converter, patterns) in self.converters.items():  # one tensor that becomes several
            for other in converter.target_patterns[1:]:
                twin = target.replace(converter.target_patterns[0], other)
                made_of.setdefault(twin, list(patterns))
        return made_of

    def _learn(self, name: str, table: "_Table") -> None:
        """Find the tensor of the model that ``name`` refers to; the codes of a packed tensor count as the tensor."""
        suffix = next((s for s in (".weight_packed", ".weight_scale") if name.endswith(s)), "")
        stem = name.removesuffix(suffix)
        for plain in (f"{stem}.weight", stem) if suffix else (name,):
            key, pattern, converter = table.rename(plain)
            if key in table.state:
                break
        else:
            return
        theirs = table.hub_form(key) if plain == key else plain
        if not suffix:
            self._kept[name] = theirs
        ours = table.in_text(key)
        if ours is None:
            self.passed.add(name)
            return
        if converter is not None:
            expert = _expert_of(stem.removesuffix(".weight"), ours, converter, pattern)
            if expert:
                self._add_expert(name, expert)
                self._note(self._prefix(name), expert.module)
            else:
                self._tensor[name] = ours + _SUFFIXES.get(suffix, "")
            if not suffix:
                self.converters.setdefault(ours, (converter, {}))[1][name] = str(pattern)
            return
        self._tensor[name] = ours + _SUFFIXES.get(suffix, "")
        self._note(theirs, ours)

    @staticmethod
    def _prefix(name: str) -> str:
        match = _EXPERT.fullmatch(_module(name) or "")
        assert match
        return match[1]

    def _add_expert(self, name: str, expert: Expert) -> None:
        module = _module(name)
        assert module is not None
        self._expert[module] = expert
        self._tensor[name] = f"{expert.module}.{ROLES[expert.role][0]}{_SUFFIXES[name.removeprefix(module)]}"

    def _note(self, theirs: str, ours: str) -> None:
        """Record both names of a tensor or module, and of the modules that contain it while their last parts agree."""
        self._modules[ours] = theirs
        a, b = theirs.split("."), ours.split(".")
        while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
            a.pop()
            b.pop()
            self._modules.setdefault(".".join(b), ".".join(a))


class _Table:
    """The conversion table of transformers for a model, applied to one name at a time."""

    def __init__(self, built: Built):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        whole = built.whole
        mapping = get_model_conversion_mapping(whole)
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        saved = get_model_conversion_mapping(whole, add_legacy=False)
        # The same as transformers does when it saves. Prefix changes are left out, because they cannot be reversed.
        self._reversed = [
            entry.reverse_transform()
            for entry in saved[::-1]
            if isinstance(entry, WeightRenaming) and not isinstance(entry, PrefixChange)
        ]
        self._base = whole.base_model_prefix
        self.state = dict(whole.state_dict())
        self._prefixes = text_prefixes(built) if whole is not built.model else None

    def rename(self, name: str) -> tuple[str, str | None, Any]:
        """Return the whole model's tensor for checkpoint tensor ``name``, and the matching pattern and converter.

        If the model has no such tensor, the returned name is not in ``state``.
        """
        from transformers.core_model_loading import rename_source_key

        key, pattern = rename_source_key(name, self._renamings, self.converters, self._base, self.state)
        if key not in self.state and name in self.state:
            key, pattern = rename_source_key(name, [], [], self._base, self.state)
        converter = next((c for c in self.converters if pattern in c.source_patterns), None) if pattern else None
        return key, pattern, converter

    def hub_form(self, key: str) -> str:
        """Return the name under which transformers saves the whole model's tensor ``key``, if it can load this name."""
        from transformers.core_model_loading import rename_source_key

        saved, _ = rename_source_key(key, self._reversed, [])
        return saved if self.rename(saved)[0] == key else key

    def in_text(self, key: str) -> str | None:
        """Return the text model's name of the whole model's tensor ``key``; None if it belongs to another part."""
        if self._prefixes is None:
            return key
        for theirs, ours in self._prefixes.items():
            if key.startswith(theirs + "."):
                return ours + key.removeprefix(theirs)
        return None

    def leaves(self) -> dict[str, str]:
        """Return for each role the name of this matrix of an expert in checkpoints."""
        leaves = {role: role for role in ROLES}
        for converter in self.converters:
            stack = converter.target_patterns[0].rpartition(".")[2]
            roles = [role for role, (name, _) in ROLES.items() if name == stack]
            if ".experts." in converter.target_patterns[0] and is_merged(converter):
                found = [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in converter.source_patterns]
                leaves |= dict(zip(roles, found, strict=False)) if len(found) == len(roles) else {}
        return leaves


def is_merged(converter: Any) -> bool:
    """Return whether ``converter`` only concatenates the matrices of experts along the rows and stacks them."""
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return kinds in ([("MergeModulelist", 0), ("Concatenate", 1)], [("MergeModulelist", 0)])


def _renamed(name: str, modules: dict[str, str]) -> str:
    """Return ``name`` with its longest prefix that is a key of ``modules`` replaced."""
    head, tail = name, ""
    while head:
        if head in modules:
            return modules[head] + tail
        head, _, leaf = head.rpartition(".")
        tail = f".{leaf}{tail}"
    return name


def _module(name: str) -> str | None:
    """Return the module of a checkpoint's weight ``name``, packed or not."""
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return None


def _expert_of(module: str, target: str, converter: Any, pattern: str | None) -> Expert | None:
    """Return the expert matrix that ``module`` of a checkpoint is in the model's tensor ``target``, if it is one."""
    match = _EXPERT.fullmatch(module)
    holder, _, stack = target.rpartition(".")
    roles = [role for role, (name, _) in ROLES.items() if name == stack]
    if not match or not is_merged(converter) or len(roles) != len(converter.source_patterns):
        return None
    return Expert(holder, int(match[2]), roles[converter.source_patterns.index(pattern)])
