"""The sizes of a model that memory depends on; `verl_aqn.preflight.sizing` reads them from a config.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Numbers of elements and features; `verl_aqn.preflight.memory_plan` computes bytes from them.

    `linears`: elements of the weights [N, K] that MXFP4 packs (linear layers and MoE experts). `kept`: elements of all
    other parameters, of which `root` are outside the decoder layers (embeddings, head, last norm), and `norms` are in
    norms. `layer_linears`, `layer_kept`: of the largest decoder layer; `largest`: of the largest packed matrix.
    `adapted`: Σ (N + K) over the linear layers, so that a LoRA adapter of rank r has r · adapted elements. `query`,
    `key_value`: features of all heads together. `inner`: features between the two halves of an MLP for one token,
    summed over its `experts`, which are chosen from `routed` experts. `packed_experts`: whether the experts are packed
    too. `bare_head`: whether the model returns what its head returns, so that its logits need not exist at once.
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
    bare_head: bool = False

    def divides_heads(self, parts: int) -> bool:
        """Return whether vLLM can divide the heads among `parts` tensor-parallel ranks."""
        few, many = sorted((self.key_value_heads, parts))
        return self.heads % parts == 0 and many % few == 0

    def key_value_of_rank(self, parts: int) -> int:
        """Return the features of keys (= of values) on each of `parts` ranks.

        A rank has at least one head, which may be a copy of another rank's.
        """
        return self.key_value // self.key_value_heads * max(1, self.key_value_heads // parts)

    @property
    def parameters(self) -> int:
        return self.linears + self.kept
