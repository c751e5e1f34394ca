"""The sizes of a model that memory depends on; `verl_aqn.preflight.sizing` reads them from a config.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Numbers of elements and features; bytes are made of them in `verl_aqn.preflight.memory_plan`.

    `linears`: elements of the weights [N, K] that MXFP4 packs (linear layers and MoE experts); `kept`: of all other
    parameters, of which `root` lie outside the decoder layers (embeddings, head, last norm), and `norms` in norms.
    `layer_linears`, `layer_kept`: of the largest decoder layer; `largest`: of the largest packed matrix.
    `adapted`: Σ (N + K) over the linear layers, so that a LoRA adapter of rank r has r · adapted elements.
    `query`, `key_value`: features of all heads together. `inner`: features between the two halves of an MLP that one
    token passes, all of its `experts` together, which are chosen among `routed`. `packed_experts`: those are packed,
    too.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    heads: int
    key_value_heads: int
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

    def divides_heads(self, parts: int) -> bool:
        """Whether vLLM can share the heads out among `parts` tensor-parallel ranks."""
        few, many = sorted((self.key_value_heads, parts))
        return self.heads % parts == 0 and many % few == 0

    def key_value_of_rank(self, parts: int) -> int:
        """Features of keys (= of values) on each of `parts` ranks: of one head at least, which other ranks have too."""
        return self.key_value // self.key_value_heads * max(1, self.key_value_heads // parts)

    @property
    def parameters(self) -> int:
        return self.linears + self.kept
