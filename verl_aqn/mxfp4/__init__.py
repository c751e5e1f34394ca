"""MXFP4 weights: the codec, a packed linear layer, and packed checkpoints. Importing this package needs only torch."""

from verl_aqn.mxfp4.codec import Mxfp4Tensor, dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.linear import Mxfp4Linear

__all__ = ["Mxfp4Linear", "Mxfp4Tensor", "dequantize", "fake_quantize", "quantize"]
