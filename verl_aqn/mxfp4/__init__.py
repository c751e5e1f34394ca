"""MXFP4 weights: the codec, a packed linear layer, and packed checkpoints. Importing this package needs only torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_aqn.mxfp4.codec import Mxfp4Tensor, dequantize, fake_quantize, quantize
    from verl_aqn.mxfp4.linear import Mxfp4Linear

__all__ = ["Mxfp4Linear", "Mxfp4Tensor", "dequantize", "fake_quantize", "quantize"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: names and chips are read by code that must not need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'linear' if name == 'Mxfp4Linear' else 'codec'}"), name)
