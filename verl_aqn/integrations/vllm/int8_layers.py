"""Read back linear layers that vllm-ascend holds in int8 (W8A16). Nothing in this file imports vLLM."""

from collections.abc import Callable

from torch import Tensor

from verl_aqn.checkpoints.int8_base import int8_digest
from verl_aqn.checkpoints.modelslim import INT8_SUFFIXES
from verl_aqn.checkpoints.slices import Loaded, blocks_of
from verl_aqn.errors import EvidenceError, ModelError


def int8_names(loaded: Loaded, module: str) -> tuple[str, ...] | None:
    """Return the names of a module's weight, scales and offsets, or None if the module is not int8."""
    names = tuple(module + suffix for suffix in INT8_SUFFIXES)
    whole = all(name in loaded.sources for name in names)
    return names if whole and loaded.sources[names[0]].dtype == "int8" else None


def int8_held(loaded: Loaded, module: str, parameter: Callable[[str], Tensor]) -> str:
    """Return the digest of what `parameter` holds of an int8 module: of the part of this rank.

    Raises:
        EvidenceError: the rank holds scales or offsets of other rows than weights, or the tensors do not fit together.
    """
    names = int8_names(loaded, module)
    assert names is not None
    height, _ = loaded.sources[names[0]].matrix
    rows = [[pair for row, count, *_ in blocks_of(loaded.region(n) or [0, height, 0, 1]) for pair in (row, count)]
            for n in names]  # fmt: skip
    if rows[1:] != rows[:1] * 2:
        raise EvidenceError(f"{module}: weights of rows {rows[0]} with scales of {rows[1]} and offsets of {rows[2]}")
    try:
        return int8_digest(*(loaded.read(name, parameter) for name in names))
    except ModelError as error:
        raise EvidenceError(f"{module}: {error}") from error


def int8_as_now(loaded: Loaded, module: str, parameter: Callable[[str], Tensor]) -> bool:
    """Return whether a layer's current weight, scales and offsets stand for the values that `module` was loaded with.

    After loading, vllm-ascend keeps the weight [N, K] as [K, N], and scales and offsets [N, 1] as [N].
    """

    def as_loaded(place: str) -> Tensor:
        shape, dtype = loaded.parameters[place]
        now = parameter(place)
        transposed = place.endswith(INT8_SUFFIXES[0])
        expected = shape[::-1] if transposed else shape[:1]
        if (tuple(now.shape), str(now.dtype).removeprefix("torch.")) != (expected, dtype):
            raise EvidenceError(f"{place} is {now.dtype} {list(now.shape)}, not {dtype} {list(expected)}")
        return now.t() if transposed else now.unsqueeze(1)

    try:
        return int8_held(loaded, module, as_loaded) == loaded.digests[module]
    except EvidenceError:
        return False
