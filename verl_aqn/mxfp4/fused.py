"""Groups of layers that a serving engine fuses into one layer: either all of a group are packed, or none.

vLLM merges sibling linear layers with the same input into one matrix with one quantisation scheme. Its model classes
list them in ``packed_modules_mapping``. A contract test (tests/contract/test_vllm_fused.py) compares `FUSED` with all
of these lists.
"""

from collections.abc import Iterable

# Names that vLLM merges if they are children of one module, with the model classes that use them.
FUSED = (
    ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj"),  # nearly all; with g or b in OLMo-Hybrid and Bailing
    ("gate_proj", "up_proj"),  # nearly all
    ("w1", "w3"),  # LFM2, InternLM2
    ("c_fc_0", "c_fc_1"),  # EXAONE 3
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek and GLM with MLA
    ("in_proj_qkv", "in_proj_z"),  # Qwen3.5
    ("in_proj_b", "in_proj_a"),  # Qwen3.5
)


def fused_groups(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Group ``modules`` by the layers that an engine merges; the order is kept."""
    groups: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        fused = next((fused for fused in FUSED if last in fused), (last,))
        groups.setdefault(f"{parent}.{fused[0]}", []).append(name)
    return [tuple(group) for group in groups.values()]
