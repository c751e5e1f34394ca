"""The MXFP4 kernels: one module per device, each with the same three functions and bit-identical results.

The caller allocates all tensors. They are contiguous and hold B blocks of 32 elements each:

* ``quantize(x, scale_rule, rounding, seed, packed, scale)`` fills packed uint8 [B, 16] and scale uint8 [B]
  from x [B, 32];
* ``dequantize(packed, scale, out)`` fills out [B, 32];
* ``fake_quantize(x, scale_rule, rounding, seed, out)`` quantises and dequantises without storing the bytes.

`reference` defines the results. It is written in plain PyTorch and runs on every device.
"""
