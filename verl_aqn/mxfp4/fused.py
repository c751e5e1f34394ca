"""Layers that a serving engine holds as one: all of them are packed, or none.

vLLM merges sibling linear layers with the same input into one matrix with one scheme. Its model classes say which, in
``packed_modules_mapping``; a contract test (tests/contract/test_vllm_fused.py) reads all of these and compares.
"""

from collections.abc import Iterable

# Names that are merged where they are children of one module, with the classes of vLLM that have them.
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
    """Return ``modules`` in their order, with those together that an engine merges."""
    groups: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        fused = next((fused for fused in FUSED if last in fused), (last,))
        groups.setdefault(f"{parent}.{fused[0]}", []).append(name)
    return [tuple(group) for group in groups.values()]
