"""Derive a model's `Shape` from its config.json alone: transformers builds the model without weights."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from verl_aqn.checkpoints.building import build
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.packing_plan import excludes, routers
from verl_aqn.checkpoints.storage import Weights, has_weights, read_config
from verl_aqn.errors import ModelError
from verl_aqn.models.layouts import has_bare_head
from verl_aqn.mxfp4.experts import STACKS, is_fused, why_not_packable
from verl_aqn.preflight.shape import Shape


def shape_of(folder: Path, exclude: tuple[str, ...]) -> Shape:
    """Return the shape of the model that transformers builds from `folder`/config.json; weights are not needed.

    `exclude`: as in `quantize_checkpoint`; for a folder that is already packed, the exclusions in its own config are
    added.

    Raises:
        ModelError: there is no config.json, transformers does not know the model, or it has no decoder layers.
    """
    quantization = read_config(folder).get("quantization_config") or {}
    exclude = (*exclude, *quantization.get("ignore", ()))
    built = build(folder)
    model = built.model
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1), None)
    layers = layers or next((m for m in model.modules() if isinstance(m, nn.ModuleList)), None)
    if layers is None:
        raise ModelError(f"{folder}: {type(model).__name__} has no list of decoder layers")
    naming = Naming(built, Weights(folder).specs if has_weights(folder) else ())
    packed = dict(_packed(model, naming, exclude))
    config, names = model.config.get_text_config(), {module: name for name, module in model.named_modules()}
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    # on the meta device each has its own tensor
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    parameters = [p for name, p in model.named_parameters() if name not in tied]
    linears, total = sum(packed.values()), sum(p.numel() for p in parameters)

    def of(layer: nn.Module) -> tuple[int, int]:
        inside = sum(packed.get(names[m], 0) for m in layer.modules())
        return inside, sum(p.numel() for p in layer.parameters()) - inside

    in_layers = [of(layer) for layer in layers]
    modules = dict(model.named_modules())
    experts = [name for name, module in modules.items() if is_fused(module)]
    adapted = [m for m in modules.values() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    return Shape(
        layers=len(layers),
        hidden=config.hidden_size,
        query=heads * head,
        key_value=key_value_heads * head,
        heads=heads,
        inner=_inner(config),
        experts=getattr(config, "num_experts_per_tok", None) or 0,
        vocabulary=config.vocab_size,
        head_norms=any(name.endswith("q_norm") for name in modules),
        linears=linears,
        kept=total - linears,
        root=total - sum(map(sum, in_layers)),
        norms=sum(p.numel() for name, p in model.named_parameters() if name.endswith("norm.weight")),
        layer_linears=max(inside for inside, _ in in_layers),
        layer_kept=max(kept for _, kept in in_layers),
        largest=max((_matrix(modules[name]) for name in packed), default=0),
        adapted=sum(m.in_features + m.out_features for m in adapted),
        routed=max((len(modules[name].get_parameter("down_proj")) for name in experts), default=0),
        packed_experts=any(name in packed for name in experts),
        key_value_heads=key_value_heads,
        bare_head=has_bare_head(model),
    )


def _packed(model: PreTrainedModel, naming: Naming, exclude: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of elements of every module that `make_plan` packs."""
    gates = routers(model)
    for name, module in model.named_modules():
        names = [naming.in_checkpoint(name)]
        if is_fused(module):  # all experts are excluded together, by the name of each
            names.append(f"{names[0]}.0.down_proj")
        kept = any(excludes(pattern, each) for each in names for pattern in exclude)
        if kept or name in gates or module is model.get_output_embeddings():
            continue
        if is_fused(module) and not why_not_packable(module):
            yield name, sum(module.get_parameter(stack).numel() for stack in STACKS)
        elif isinstance(module, nn.Linear):
            yield name, module.weight.numel()


def _matrix(module: nn.Module) -> int:
    """Return the elements that are dequantised at once: a linear layer's weight, or the larger stack of one expert."""
    return module.weight.numel() if isinstance(module, nn.Linear) else module.get_parameter("gate_up_proj")[0].numel()


def _inner(config: PretrainedConfig) -> int:
    """Return the features inside the MLP for one token: its experts and the shared expert, or the dense MLP."""
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        return config.intermediate_size
    one = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return experts * one + (shared or one * (getattr(config, "n_shared_experts", None) or 0))
