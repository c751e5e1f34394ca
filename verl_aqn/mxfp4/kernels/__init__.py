"""One module a device, with the same three functions and the same bits.

All tensors are contiguous and given by the caller, B blocks of 32 elements each:

* ``quantize(x, scale_rule, rounding, seed, packed, scale)`` fills packed uint8 [B, 16] and scale uint8 [B]
  from x [B, 32];
* ``dequantize(packed, scale, out)`` fills out [B, 32];
* ``fake_quantize(x, scale_rule, rounding, seed, out)`` is one after the other, without the bytes between.

`reference` is the definition, in plain PyTorch, and runs anywhere.
"""
