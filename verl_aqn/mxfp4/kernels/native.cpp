// MXFP4 on a CPU: one pass over memory for each of quantise, dequantise and fake-quantise.
//
// The arithmetic is bit for bit that of reference.py, whose comments derive it. Every loop has 32 iterations and no
// branch, so that the compiler can use vector instructions of any width; nothing here is specific to one CPU. On CPUs
// with AVX-512, avx512.h replaces the code of the namespace `portable`.
// Compile with -ffp-contract=off and without -ffast-math: results must not depend on the compiler.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AQN_AVX512
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "two codes are read as one little-endian number");

namespace {

constexpr int BLOCK = 32;
constexpr int32_t EXPONENT = 0x7F800000;  // float's exponent field, and the bits of Inf
enum Rule { MSE, EVEN, FLOOR, RCEIL };
enum Rounding { NEAREST, HALF_AWAY, STOCHASTIC };
enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
constexpr int32_t CARRY[] = {0, 0x200000, 0, 0x3FFFFF};

struct bfloat16 { uint16_t bits; };
using float16 = _Float16;

inline float as_float(int32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline int32_t as_bits(float f) { int32_t i; std::memcpy(&i, &f, 4); return i; }

// Bit patterns of the block's values as float32.
inline void load(const float* x, int32_t* bits) { std::memcpy(bits, x, 4 * BLOCK); }
inline void load(const bfloat16* x, int32_t* bits) {
    for (int i = 0; i < BLOCK; ++i) bits[i] = int32_t(uint32_t(x[i].bits) << 16);
}
inline void load(const float16* x, int32_t* bits) {
    for (int i = 0; i < BLOCK; ++i) bits[i] = as_bits(float(x[i]));
}

// The values are already exact in bfloat16 (except 2^128, which has become Inf before).
inline void store(float* out, const float* values) { std::memcpy(out, values, 4 * BLOCK); }
inline void store(bfloat16* out, const float* values) {
    for (int i = 0; i < BLOCK; ++i) out[i].bits = uint16_t(uint32_t(as_bits(values[i])) >> 16);
}
inline void store(float16* out, const float* values) {
    for (int i = 0; i < BLOCK; ++i) out[i] = float16(values[i]);
}

// Philox4x32-10 (Salmon et al. 2011): the four words at counter (index, index >> 32, 0, 0).
inline void philox(uint64_t index, uint64_t seed, uint32_t* words) {
    uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53) * c0, p1 = uint64_t(0xCD9E8D57) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

struct Rounded {
    alignas(64) int32_t codes[BLOCK];
    alignas(64) float values[BLOCK];  // in units of the scale
};

template <int ROUNDING>
inline void round_block(const float* magnitude, int32_t exponent, const float* uniform, Rounded& r) {
    const float inverse = as_float((254 - exponent) << 23);
    for (int i = 0; i < BLOCK; ++i) {
        const float y = magnitude[i] * inverse;
        int32_t p = as_bits(y) & EXPONENT;
        p = p < 0x3F800000 ? 0x3F800000 : p;
        p = p > 0x40800000 ? 0x40800000 : p;
        if (ROUNDING == NEAREST) {
            const int32_t c = p + (22 << 23);
            const float sum = y + as_float(c);
            const int32_t code = as_bits(sum) - c + (p >> 22) - 254;
            const float value = sum - as_float(c);
            r.codes[i] = code > 7 ? 7 : code;
            r.values[i] = value > 6 ? 6 : value;
        } else {
            // Limit y to 6, so that the number of steps fits an int32; larger values saturate anyway.
            const float t = (y > 6 ? 6 : y) * as_float((255 << 23) - p);
            const int32_t steps = int32_t(t);
            const float fraction = t - float(steps);
            const int32_t up = ROUNDING == HALF_AWAY ? fraction >= 0.5f : uniform[i] < fraction;
            const int32_t code = steps + up + (p >> 22) - 254;
            const float value = float(steps + up) * as_float(p - (1 << 23));
            r.codes[i] = code > 7 ? 7 : code;
            r.values[i] = value > 6 ? 6 : value;
        }
    }
}

// Sum of squared errors in float64, added as a tree of fixed shape, so that it is the same on every machine.
inline double squared_error(const float* magnitude, int32_t exponent, const Rounded& r) {
    const float inverse = as_float((254 - exponent) << 23);
    alignas(64) double s[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        const double e = double(r.values[i] - magnitude[i] * inverse);
        s[i] = e * e;
    }
    for (int i = 0; i < 16; ++i) s[i] += s[i + 16];
    for (int i = 0; i < 8; ++i) s[i] += s[i + 8];
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// Return the biased exponent of the block's scale and put the rounded magnitudes into `r`; 255 for NaN or Inf.
template <int RULE, int ROUNDING>
inline int32_t encode(const int32_t* bits, uint64_t block, uint64_t seed, Rounded& r) {
    alignas(64) float magnitude[BLOCK], uniform[BLOCK];
    int32_t amax = 0;
    for (int i = 0; i < BLOCK; ++i) {
        const int32_t m = bits[i] & 0x7FFFFFFF;
        magnitude[i] = as_float(m);
        amax = m > amax ? m : amax;
    }
    if (amax >= EXPONENT) return 255;
    if (ROUNDING == STOCHASTIC) {
        alignas(64) uint32_t words[BLOCK];
        for (int i = 0; i < BLOCK / 4; ++i) philox(block * (BLOCK / 4) + i, seed, words + 4 * i);
        for (int i = 0; i < BLOCK; ++i) uniform[i] = float(int32_t(words[i] >> 8)) * 0x1p-24f;
    }
    int32_t exponent = ((amax + CARRY[RULE]) >> 23) - 2;
    if (RULE == MSE) {
        const int32_t low = exponent < 0 ? 0 : exponent, high = exponent + 1 < 0 ? 0 : exponent + 1;
        Rounded other;
        round_block<NEAREST>(magnitude, low, nullptr, r);
        round_block<NEAREST>(magnitude, high, nullptr, other);
        // Each error is in units of its own scale; the larger scale is twice the smaller.
        const bool better = 4 * squared_error(magnitude, high, other) < squared_error(magnitude, low, r);
        exponent = better ? high : low;
        if (ROUNDING == NEAREST) {
            if (better) r = other;
            return exponent;
        }
    }
    exponent = exponent < 0 ? 0 : exponent;
    round_block<ROUNDING>(magnitude, exponent, uniform, r);
    return exponent;
}

// Write the bfloat16 bit patterns of 32 codes (0..15) with a scale; every value is exact in bfloat16.
inline void decode(const uint8_t* codes, int32_t scale, uint16_t* bits) {
    if (scale >= 2 && scale <= 252) {
        // Code m > 1 is 0x3F00 + 64 m in bfloat16, 1 is 0x3F00 and 0 is 0; the scale adds to the exponent.
        const uint16_t base = uint16_t(0x3F00 + ((scale - 127) << 7));
        for (int i = 0; i < BLOCK; ++i) {
            const uint16_t m = codes[i] & 7, sign = uint16_t((codes[i] & 8) << 12);
            const uint16_t above = m == 1 ? 0 : uint16_t(m << 6);
            bits[i] = sign | (m == 0 ? 0 : uint16_t(base + above));
        }
        return;
    }
    // At the ends of the range the results can be subnormal or Inf.
    static const float values[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    for (int i = 0; i < BLOCK; ++i) {
        const float value = std::ldexp(values[codes[i] & 7], scale - 127);
        bits[i] = scale == 255 ? 0x7FC0 : uint16_t(uint32_t(as_bits(value)) >> 16 | (codes[i] & 8) << 12);
    }
}

inline void store(bfloat16* out, const uint16_t* bits) { std::memcpy(out, bits, 2 * BLOCK); }
inline void store(float* out, const uint16_t* bits) {
    for (int i = 0; i < BLOCK; ++i) out[i] = as_float(int32_t(uint32_t(bits[i]) << 16));
}
inline void store(float16* out, const uint16_t* bits) {
    for (int i = 0; i < BLOCK; ++i) out[i] = float16(as_float(int32_t(uint32_t(bits[i]) << 16)));
}

// Write 32 codes to 16 bytes.
inline void pack(const uint8_t* codes, uint8_t* packed) {
    alignas(64) uint16_t pairs[BLOCK / 2];  // two codes each, the even index in the low byte
    std::memcpy(pairs, codes, BLOCK);
    for (int i = 0; i < BLOCK / 2; ++i) packed[i] = uint8_t(pairs[i] | (pairs[i] >> 4));
}

// A shortcut for rounding to nearest, in 16-bit integers. `exponents` chooses the scales of some blocks, and NOT_HERE for
// blocks that need the general code above: scales at the ends of the range, NaN and Inf, and blocks that both scales of
// the rule `mse` fit almost equally well. `quantize` and `fake_quantize` do the others.
constexpr int32_t NOT_HERE = -1;
constexpr int64_t GROUP = 16;

#ifdef AQN_AVX512
#include "avx512.h"
namespace shortcut = avx512;
#else
namespace portable {

// For bfloat16 and all rules but `mse`.
template <int RULE>
inline void exponents(const bfloat16* x, int64_t blocks, int32_t* exponent) {
    for (int64_t b = 0; b < blocks; ++b) {
        int16_t amax = 0;
        for (int i = 0; i < BLOCK; ++i) {
            const int16_t m = int16_t(x[b * BLOCK + i].bits & 0x7FFF);
            amax = m > amax ? m : amax;
        }
        const int32_t e = (((int32_t(amax) << 16) + CARRY[RULE]) >> 23) - 2;
        exponent[b] = RULE == MSE || e < 3 || e > 250 ? NOT_HERE : e;
    }
}
template <int RULE, class T>
inline void exponents(const T*, int64_t blocks, int32_t* exponent) {
    for (int64_t b = 0; b < blocks; ++b) exponent[b] = NOT_HERE;
}

// Bit patterns of positive floats are ordered and spaced like their values, so rounding is integer arithmetic. `m` is the
// pattern of |x| minus that of the scale. From 1 on, the grid has a value at every 64th pattern. Round `m` to these, ties
// to even, and limit it to that of 6. Below 1, values above 0.25 become 0.5, and values from 0.75 on become 1.
inline int16_t rounded_pattern(int16_t m) {
    const int16_t above = m > 0 ? m : int16_t(0);
    const int16_t odd = int16_t(int16_t(above >> 6) & 1);
    const int16_t pattern = int16_t(int16_t(above + 31 + odd) & -64);
    return pattern > 0x140 ? int16_t(0x140) : pattern;
}

inline void quantize(const bfloat16* x, int32_t exponent, uint8_t* packed) {
    alignas(64) uint8_t codes[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        const int16_t m = int16_t((x[i].bits & 0x7FFF) - (exponent << 7));
        const int16_t half = m > -0x100 ? int16_t(1) : int16_t(0), one = m >= -0x40 ? int16_t(1) : int16_t(0);
        const int16_t code = int16_t(int16_t(rounded_pattern(m) >> 6) + half + one);
        codes[i] = uint8_t(code | ((x[i].bits >> 12) & 8));
    }
    pack(codes, packed);
}

inline void fake_quantize(const bfloat16* x, int32_t exponent, bfloat16* out) {
    const int16_t scale = int16_t(exponent << 7);
    for (int i = 0; i < BLOCK; ++i) {
        const int16_t m = int16_t((x[i].bits & 0x7FFF) - scale);
        const int16_t small = m > -0x100 ? int16_t(scale - 0x80) : int16_t(0);
        const int16_t value = m >= -0x40 ? int16_t(scale + rounded_pattern(m)) : small;
        out[i].bits = uint16_t(value | (x[i].bits & 0x8000));
    }
}

template <class T>
inline void quantize(const T*, int32_t, uint8_t*) {}  // not called, see `exponents`
template <class T>
inline void fake_quantize(const T*, int32_t, T*) {}

template <class T>
void dequantize(const uint8_t* packed, const uint8_t* scale, int64_t begin, int64_t end, T* out) {
    for (int64_t b = begin; b < end; ++b) {
        const uint8_t* from = packed + b * (BLOCK / 2);
        alignas(64) uint16_t pairs[BLOCK / 2], bits[BLOCK];
        alignas(64) uint8_t codes[BLOCK];
        for (int i = 0; i < BLOCK / 2; ++i) pairs[i] = (from[i] | uint16_t(from[i] << 4)) & 0x0F0F;
        std::memcpy(codes, pairs, sizeof codes);
        decode(codes, scale[b], bits);
        store(out + b * BLOCK, bits);
    }
}

}  // namespace portable
namespace shortcut = portable;
#endif

template <class T, int RULE, int ROUNDING>
inline void quantize_block(const T* x, int64_t block, uint64_t seed, uint8_t* packed, uint8_t* scale) {
    alignas(64) int32_t bits[BLOCK];
    alignas(64) uint8_t codes[BLOCK];
    Rounded r;
    load(x, bits);
    const int32_t exponent = encode<RULE, ROUNDING>(bits, block, seed, r);
    *scale = uint8_t(exponent);
    if (exponent == 255) {
        std::memset(packed, 0, BLOCK / 2);
        return;
    }
    for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(r.codes[i] | ((bits[i] >> 31) & 8));
    pack(codes, packed);
}

template <class T, int RULE, int ROUNDING>
inline void fake_quantize_block(const T* x, int64_t block, uint64_t seed, T* out) {
    alignas(64) int32_t bits[BLOCK];
    Rounded r;
    load(x, bits);
    const int32_t exponent = encode<RULE, ROUNDING>(bits, block, seed, r);
    // Half of the value times twice the scale, because 2^-127 is not a normal float; the exponent is at most 253.
    const float unit = exponent == 255 ? as_float(0x7FC00000) : as_float((exponent + 1) << 23);
    if (exponent == 255) std::memset(r.values, 0, sizeof r.values);
    for (int i = 0; i < BLOCK; ++i)
        r.values[i] = as_float(as_bits(r.values[i] * 0.5f * unit) | (exponent == 255 ? 0 : bits[i] & INT32_MIN));
    store(out, r.values);
}

// Call `quick(block, exponent)` for each block that has a shortcut, and `general(block)` for the others.
template <int RULE, int ROUNDING, class T, class Quick, class General>
inline void each_block(const T* x, int64_t begin, int64_t end, Quick quick, General general) {
    for (int64_t first = begin; first < end; first += GROUP) {
        const int64_t blocks = end - first < GROUP ? end - first : GROUP;
        int32_t exponent[GROUP];
        bool all = ROUNDING == NEAREST;
        if (ROUNDING == NEAREST) shortcut::exponents<RULE>(x + first * BLOCK, blocks, exponent);
        for (int64_t i = 0; i < blocks && ROUNDING == NEAREST; ++i) all &= exponent[i] != NOT_HERE;
        if (all) {  // a loop without general code, so that its constants stay in registers
            for (int64_t i = 0; i < blocks; ++i) quick(first + i, exponent[i]);
            continue;
        }
        for (int64_t i = 0; i < blocks; ++i)
            ROUNDING == NEAREST && exponent[i] != NOT_HERE ? quick(first + i, exponent[i]) : general(first + i);
    }
}

template <class T, int RULE, int ROUNDING>
void quantize(const T* x, int64_t begin, int64_t end, uint64_t seed, uint8_t* packed, uint8_t* scale) {
    each_block<RULE, ROUNDING>(
        x, begin, end,
        [=](int64_t b, int32_t exponent) {
            scale[b] = uint8_t(exponent);
            shortcut::quantize(x + b * BLOCK, exponent, packed + b * (BLOCK / 2));
        },
        [=](int64_t b) {
            quantize_block<T, RULE, ROUNDING>(x + b * BLOCK, b, seed, packed + b * (BLOCK / 2), scale + b);
        });
}

template <class T, int RULE, int ROUNDING>
void fake_quantize(const T* x, int64_t begin, int64_t end, uint64_t seed, T* out) {
    each_block<RULE, ROUNDING>(
        x, begin, end,
        [=](int64_t b, int32_t exponent) { shortcut::fake_quantize(x + b * BLOCK, exponent, out + b * BLOCK); },
        [=](int64_t b) { fake_quantize_block<T, RULE, ROUNDING>(x + b * BLOCK, b, seed, out + b * BLOCK); });
}

// OpenMP's threads are those of torch, which wait in a loop for the next product: others would compete with them.
template <class F>
void parallel(int64_t blocks, int threads, F&& work) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t) work(blocks * t / threads, blocks * (t + 1) / threads);
#else
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t)
        others.emplace_back([&, t] { work(blocks * t / threads, blocks * (t + 1) / threads); });
    work(0, blocks / threads);
    for (auto& thread : others) thread.join();
#endif
}

template <class T, int RULE>
void quantize_by(int rounding, const void* x, int64_t blocks, uint64_t seed, uint8_t* packed, uint8_t* scale,
                 void* fake, int threads) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(fake);
    parallel(blocks, threads, [=](int64_t begin, int64_t end) {
        if (rounding == NEAREST)
            to ? fake_quantize<T, RULE, NEAREST>(from, begin, end, seed, to)
               : quantize<T, RULE, NEAREST>(from, begin, end, seed, packed, scale);
        else if (rounding == HALF_AWAY)
            to ? fake_quantize<T, RULE, HALF_AWAY>(from, begin, end, seed, to)
               : quantize<T, RULE, HALF_AWAY>(from, begin, end, seed, packed, scale);
        else
            to ? fake_quantize<T, RULE, STOCHASTIC>(from, begin, end, seed, to)
               : quantize<T, RULE, STOCHASTIC>(from, begin, end, seed, packed, scale);
    });
}

template <class T>
void quantize_as(int rule, int rounding, const void* x, int64_t blocks, uint64_t seed, uint8_t* packed, uint8_t* scale,
                 void* fake, int threads) {
    switch (rule) {
        case MSE: return quantize_by<T, MSE>(rounding, x, blocks, seed, packed, scale, fake, threads);
        case EVEN: return quantize_by<T, EVEN>(rounding, x, blocks, seed, packed, scale, fake, threads);
        case FLOOR: return quantize_by<T, FLOOR>(rounding, x, blocks, seed, packed, scale, fake, threads);
        default: return quantize_by<T, RCEIL>(rounding, x, blocks, seed, packed, scale, fake, threads);
    }
}

#include "error_parts.h"
#include "mxfp8.h"
#include "transposed.h"
#include "product.h"
#include "norm.h"

}  // namespace

// Quantise x [blocks, 32] of `dtype` to packed [blocks, 16] and scale [blocks], or, if `fake` is given, write the
// rounded values there.
extern "C" void aqn_quantize(const void* x, int dtype, int64_t blocks, int rule, int rounding, uint64_t seed,
                             uint8_t* packed, uint8_t* scale, void* fake, int threads) {
    switch (dtype) {
        case FLOAT32: return quantize_as<float>(rule, rounding, x, blocks, seed, packed, scale, fake, threads);
        case BFLOAT16: return quantize_as<bfloat16>(rule, rounding, x, blocks, seed, packed, scale, fake, threads);
        default: return quantize_as<float16>(rule, rounding, x, blocks, seed, packed, scale, fake, threads);
    }
}

extern "C" void aqn_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t blocks, int dtype, void* out,
                               int threads) {
    parallel(blocks, threads, [=](int64_t begin, int64_t end) {
        switch (dtype) {
            case FLOAT32: return shortcut::dequantize(packed, scale, begin, end, static_cast<float*>(out));
            case BFLOAT16: return shortcut::dequantize(packed, scale, begin, end, static_cast<bfloat16*>(out));
            default: return shortcut::dequantize(packed, scale, begin, end, static_cast<float16*>(out));
        }
    });
}

// Round x [blocks, 32] of `dtype` to MXFP8 and write the values to out [blocks, 32] of the same dtype.
extern "C" void aqn_mxfp8_fake_quantize(const void* x, int dtype, int64_t blocks, void* out, int threads) {
    parallel(blocks, threads, [=](int64_t begin, int64_t end) {
        const auto round = [=](auto* from, auto* to) {
            for (int64_t b = begin; b < end; ++b) fake_quantize_mxfp8(from + b * BLOCK, to + b * BLOCK);
        };
        switch (dtype) {
            case FLOAT32: return round(static_cast<const float*>(x), static_cast<float*>(out));
            case BFLOAT16: return round(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(out));
            default: return round(static_cast<const float16*>(x), static_cast<float16*>(out));
        }
    });
}

// Write to parts [chunks, PARTS] the parts of the error of x [blocks, 32], for each chunk of `chunk` blocks. The result
// does not depend on the number of threads.
extern "C" void aqn_error_parts(const void* x, int dtype, const uint8_t* packed, const uint8_t* scale, int64_t blocks,
                                int64_t chunk, double* parts, int threads) {
    parallel((blocks + chunk - 1) / chunk, threads, [=](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
            const int64_t begin = c * chunk, end = begin + chunk < blocks ? begin + chunk : blocks;
            double* to = parts + c * PARTS;
            switch (dtype) {
                case FLOAT32: error_parts(static_cast<const float*>(x), packed, scale, begin, end, to); break;
                case BFLOAT16: error_parts(static_cast<const bfloat16*>(x), packed, scale, begin, end, to); break;
                default: error_parts(static_cast<const float16*>(x), packed, scale, begin, end, to);
            }
        }
    });
}

// Write the transpose of W [rows, columns * 32] to out [columns * 32, rows] in bfloat16.
extern "C" void aqn_dequantize_transposed(const uint8_t* packed, const uint8_t* scale, int64_t rows, int64_t columns,
                                          void* out, int threads) {
    parallel(columns, threads, [=](int64_t begin, int64_t end) {
        dequantize_transposed(packed, scale, rows, columns, begin, end, static_cast<uint16_t*>(out));
    });
}

// Whether `aqn_multiply` can be called: it needs AVX512-BF16 and OpenMP.
extern "C" int aqn_can_multiply() {
#ifdef AQN_PRODUCT
    return 1;
#else
    return 0;
#endif
}

// Write y [tokens, n] = x [tokens, k] W^T + (x A^T) B^T + bias, all bfloat16, with W [n, k] packed, A [rank, k] and
// B [n, rank]. rank may be 0, bias may be null. `inner` [tokens, rank] is overwritten by x A^T.
extern "C" void aqn_multiply(const uint8_t* packed, const uint8_t* scale, int64_t n, int64_t k, const uint16_t* x,
                             int64_t tokens, const uint16_t* bias, const uint16_t* a, const uint16_t* b, int64_t rank,
                             uint16_t* inner, uint16_t* y, int threads) {
#ifdef AQN_PRODUCT
    product::compute(packed, scale, n, k, x, tokens, bias, a, b, rank, inner, y, threads);
#endif
}

// y = RMSNorm of x [rows, width] + residual, see norm.h. `residual` and `sum` may be null.
extern "C" void aqn_rms_norm(const uint16_t* x, const uint16_t* residual, const float* weight, double epsilon,
                             int64_t rows, int64_t width, uint16_t* y, uint16_t* sum, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; ++t)
        rms_norm(x, residual, weight, epsilon, rows * t / threads, rows * (t + 1) / threads, width, y, sum);
}
