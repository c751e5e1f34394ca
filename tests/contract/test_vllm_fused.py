"""Our table of layers that an engine merges equals vLLM's ``packed_modules_mapping`` of every model, read as source."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from verl_aqn.mxfp4.fused import FUSED, fused_groups

# Parts of vision, audio and encoder models are not quantised.
NOT_OURS = {
    ("wq", "wk", "wv"),
    ("fc1", "fc3"),
    ("query", "key", "value"),
    ("attn.q", "attn.k", "attn.v"),
    ("gate_proj", "dense_h_to_4h"),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}


@cache
def mappings() -> list[tuple[str, tuple[str, ...]]]:
    """Yield (file, names that become one layer) wherever a vLLM model class states a mapping, fixed or made later."""
    return list(_read())


def _read() -> Iterator[tuple[str, tuple[str, ...]]]:
    locations = getattr(find_spec("vllm"), "submodule_search_locations", None)
    assert locations
    for file in (Path(locations[0]) / "model_executor/models").glob("*.py"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if "packed_modules_mapping" in text else ():
            if isinstance(node, ast.AnnAssign):
                targets, value = [node.target], node.value
            elif isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            else:
                continue
            if value is None or not any("packed_modules_mapping" in ast.unparse(target) for target in targets):
                continue
            for part in ast.walk(value):
                if isinstance(part, ast.List) and all(isinstance(e, ast.Constant) for e in part.elts):
                    yield file.name, tuple(e.value for e in part.elts if isinstance(e, ast.Constant))


def test_every_merged_layer_of_vllm_is_in_the_table():
    found = {names: file for file, names in mappings() if len(set(names)) > 1}
    assert len(found) >= 8, "the mappings are written in another way now"
    for names, file in found.items():
        assert names in NOT_OURS or any(set(names) <= set(fused) for fused in FUSED), f"{names} of {file}"


def test_the_table_has_nothing_else():
    merged = {name for _, names in mappings() if len(names) > 1 for name in names}
    assert {name for fused in FUSED for name in fused} <= merged


def test_groups():
    names = ["a.q_proj", "a.k_proj", "a.o_proj", "b.gate_proj", "b.up_proj", "c.q_proj"]
    assert fused_groups(names) == [
        ("a.q_proj", "a.k_proj"),
        ("a.o_proj",),
        ("b.gate_proj", "b.up_proj"),
        ("c.q_proj",),
    ]
