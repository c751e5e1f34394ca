"""The sizes of a model that memory depends on; `verl_aqn.preflight.model` reads them from a config.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Numbers of elements and features; bytes are made of them in `verl_aqn.preflight.memory`.

    `linears`: elements of the weights [N, K] that MXFP4 packs (linear layers and MoE experts); `kept`: of all other
    parameters, of which `root` lie outside the decoder layers (embeddings, head, last norm), and `norms` in norms.
    `layer_linears`, `layer_kept`: of the largest decoder layer; `largest`: of the largest packed matrix.
    `adapted`: Σ (N + K) over the linear layers, so that a LoRA adapter of rank r has r · adapted elements.
    `inner`: features between the two halves of an MLP that one token passes, all of its `experts` together, which are
    chosen among `routed`. `packed_experts`: those are packed, too.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    heads: int
    inner: int
    experts: int
    vocabulary: int
    head_norms: bool
    linears: int
    kept: int
    root: int
    norms: int
    layer_linears: int
    layer_kept: int
    largest: int
    adapted: int
    routed: int = 0
    packed_experts: bool = False

    @property
    def parameters(self) -> int:
        return self.linears + self.kept
