// Fake-quantisation to MXFP8, with the arithmetic of verl_aqn/mxfp4/mxfp8.py bit for bit; the comments there derive it.
// Included by native.cpp. Portable, as native.cpp is: the loops have 32 iterations and no branch.

template <class T>
inline void fake_quantize_mxfp8(const T* x, T* out) {
    alignas(64) int32_t bits[BLOCK];
    alignas(64) float values[BLOCK];
    load(x, bits);
    int32_t amax = 0;
    for (int i = 0; i < BLOCK; ++i) amax = (bits[i] & 0x7FFFFFFF) > amax ? bits[i] & 0x7FFFFFFF : amax;
    if (amax >= EXPONENT) {
        for (int i = 0; i < BLOCK; ++i) values[i] = as_float(0x7FC00000);
        return store(out, values);
    }
    const int32_t shifted = (amax >> 23) - 8, exponent = shifted < 0 ? 0 : shifted;
    const float inverse = as_float((254 - exponent) << 23);
    const float unit = as_float((exponent + 1) << 23);  // twice the scale, because 2^-127 is not a normal float
    for (int i = 0; i < BLOCK; ++i) {
        const float y = as_float(bits[i] & 0x7FFFFFFF) * inverse;
        int32_t p = as_bits(y) & EXPONENT;
        p = p < (121 << 23) ? (121 << 23) : p;
        p = p > (135 << 23) ? (135 << 23) : p;
        const float c = as_float(p + (20 << 23));
        const float rounded = (y + c) - c, value = rounded > 448 ? 448 : rounded;
        values[i] = as_float(as_bits(value * 0.5f * unit) | (bits[i] & INT32_MIN));
    }
    store(out, values);
}
