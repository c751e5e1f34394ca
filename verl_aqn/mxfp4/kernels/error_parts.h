// The parts of the rounding error that verl_aqn/mxfp4/error_split.py defines, in one pass over a weight and its codes.
// Included by native.cpp. Portable, as native.cpp is: the loops have 32 iterations and no branch.

enum Part { SIGNAL, DEADZONE, CLIPPED, SCALE_BIAS, GRID_NOISE, DEAD, SATURATED, PARTS };

struct BlockScales {
    double ideal, inverse, limit;  // amax / 6, its inverse, and the largest value that the block can hold
};

template <class T>
inline BlockScales scales_of(const T* x, uint8_t scale) {
    alignas(64) int32_t bits[BLOCK];
    load(x, bits);
    int32_t amax = 0;
    for (int i = 0; i < BLOCK; ++i) amax = (bits[i] & 0x7FFFFFFF) > amax ? bits[i] & 0x7FFFFFFF : amax;
    const double ideal = double(as_float(amax)) / 6;
    const int64_t power = int64_t(scale - 127 + 1023) << 52;  // of two, as a double
    double unit;
    std::memcpy(&unit, &power, sizeof unit);
    return {ideal, ideal > 0 ? 1 / ideal : 1, 6 * unit};
}

// Add the parts of a block to sums[part][place in the block].
inline void add_parts(const int32_t* bits, const float* values, BlockScales s, double (*sums)[BLOCK]) {
    for (int i = 0; i < BLOCK; ++i) {
        const double w = double(as_float(bits[i])), q = double(values[i]), size = std::fabs(w);
        const double error = (w - q) * (w - q), y = size * s.inverse;
        // The step of the grid is 0.5 below 2, 1 below 4 and 2 up to 6. Adding 1.5 * 2^52 rounds to integers.
        const double step = y >= 4 ? 2.0 : y >= 2 ? 1.0 : 0.5, steps = y >= 4 ? 0.5 : y >= 2 ? 1.0 : 2.0;
        const double rounded = (y * steps + 0x1.8p52) - 0x1.8p52;
        const double missed = size - rounded * (step * s.ideal), grid = missed * missed;
        const double zero = q == 0 ? 1.0 : 0.0, dead = w == 0 ? 0.0 : zero;
        const double clipped = size > s.limit ? 1.0 - dead : 0.0, rest = 1.0 - dead - clipped;
        sums[SIGNAL][i] += w * w;
        sums[DEADZONE][i] += dead * error;
        sums[CLIPPED][i] += clipped * error;
        sums[SCALE_BIAS][i] += rest * (error - grid);
        sums[GRID_NOISE][i] += rest * grid;
        sums[DEAD][i] += dead;
        sums[SATURATED][i] += clipped;
    }
}

template <class T>
void error_parts(const T* x, const uint8_t* packed, const uint8_t* scale, int64_t begin, int64_t end, double* parts) {
    alignas(64) double sums[PARTS][BLOCK] = {};
    for (int64_t first = begin; first < end; first += GROUP) {
        const int64_t blocks = end - first < GROUP ? end - first : GROUP;
        // Two loops, so that the divisions of several blocks overlap.
        BlockScales scales[GROUP];
        for (int64_t b = 0; b < blocks; ++b) scales[b] = scales_of(x + (first + b) * BLOCK, scale[first + b]);
        alignas(64) float values[GROUP * BLOCK];
        shortcut::dequantize(packed + first * (BLOCK / 2), scale + first, 0, blocks, values);
        for (int64_t b = 0; b < blocks; ++b) {
            alignas(64) int32_t bits[BLOCK];
            load(x + (first + b) * BLOCK, bits);
            add_parts(bits, values + b * BLOCK, scales[b], sums);
        }
    }
    for (int part = 0; part < PARTS; ++part) {
        parts[part] = 0;
        for (int i = 0; i < BLOCK; ++i) parts[part] += sums[part][i];
    }
}
