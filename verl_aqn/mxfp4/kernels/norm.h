// RMSNorm of bfloat16 activations with a float32 weight, which carries the noise. Included by native.cpp.

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = uint32_t(as_bits(x));
    if (x != x) return uint16_t(bits >> 16 | 0x40);  // rounding could make a NaN infinite
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// y = x / rms(x) * weight for rows begin .. end - 1 of x [rows, width]. If `residual` is given, it is added to x first,
// and `sum` becomes the rounded sum.
void rms_norm(const uint16_t* x, const uint16_t* residual, const float* weight, double epsilon, int64_t begin,
              int64_t end, int64_t width, uint16_t* y, uint16_t* sum) {
    constexpr int LANES = 16;
    std::vector<float> values(width);
    for (int64_t row = begin; row < end; ++row) {
        const uint16_t* from = x + row * width;
        uint16_t* to = y + row * width;
        for (int64_t i = 0; i < width; ++i) values[i] = as_float(int32_t(uint32_t(from[i]) << 16));
        if (residual) {
            const uint16_t* added = residual + row * width;
            for (int64_t i = 0; i < width; ++i) {
                values[i] += as_float(int32_t(uint32_t(added[i]) << 16));
                sum[row * width + i] = to_bfloat16(values[i]);
            }
        }
        float squares[LANES] = {};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int lane = 0; lane < LANES; ++lane) squares[lane] += values[i + lane] * values[i + lane];
        for (; i < width; ++i) squares[0] += values[i] * values[i];
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
        const float scale = 1 / std::sqrt(squares[0] / float(width) + float(epsilon));
        for (i = 0; i < width; ++i) to[i] = to_bfloat16(values[i] * scale * weight[i]);
    }
}
