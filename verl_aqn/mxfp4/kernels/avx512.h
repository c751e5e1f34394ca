// MXFP4 with AVX-512: the 32 elements of a block in one register of 16-bit integers. native.cpp includes this file
// instead of its namespace `portable` where the compiler's target has these instructions. The results have the same
// bits.

namespace avx512 {

constexpr int64_t STREAMED = 1 << 25;  // bytes that one thread writes

// The values of all 16 codes for all 256 scales, as computed by the portable code. A block needs one line of 32 bytes.
struct Tables {
    alignas(64) uint16_t brain[256][16], half[256][16];
    Tables() {
        uint8_t codes[BLOCK];
        for (int i = 0; i < BLOCK; ++i) codes[i] = uint8_t(i % 16);
        for (int scale = 0; scale < 256; ++scale) {
            uint16_t bits[BLOCK];
            float16 halves[BLOCK];
            decode(codes, scale, bits);
            store(halves, bits);
            std::memcpy(brain[scale], bits, sizeof brain[scale]);
            std::memcpy(half[scale], halves, sizeof half[scale]);
        }
    }
};
const Tables tables;

// The values of 32 codes, of which only the low 4 bits count: bit 4 is the highest that the permutation looks at, and
// both halves of its table are the same.
inline __m512i look_up(const uint16_t* table, __m512i codes) {
    const __m256i line = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
    return _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(line));
}
inline void store_values(bfloat16* out, __m512i codes, int scale) {
    _mm512_storeu_si512(out, look_up(tables.brain[scale], codes));
}
inline void store_values(float16* out, __m512i codes, int scale) {
    _mm512_storeu_si512(out, look_up(tables.half[scale], codes));
}
inline void store_values(float* out, __m512i codes, int scale) {
    const __m512i values = look_up(tables.brain[scale], codes);
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(values));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, 1));
    _mm512_storeu_si512(out, _mm512_slli_epi32(first, 16));
    _mm512_storeu_si512(out + 16, _mm512_slli_epi32(second, 16));
}

// As `store_values`, past the caches: `out` is aligned to 64 bytes.
template <class T>
inline void stream_values(T* out, __m512i codes, int scale) {
    alignas(64) T values[BLOCK];
    store_values(values, codes, scale);
    for (size_t i = 0; i < sizeof values / 64; ++i)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out) + i,
                            _mm512_load_si512(reinterpret_cast<const __m512i*>(values) + i));
}

template <class T>
void dequantize(const uint8_t* packed, const uint8_t* scale, int64_t begin, int64_t end, T* out) {
    const auto codes = [=](int64_t b) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + b * (BLOCK / 2)));
        // One byte in each 32-bit number: its low nibble for the low 16 bits, its high nibble for the high 16 bits.
        const __m512i pairs = _mm512_cvtepu8_epi32(bytes);
        return _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
    };
    // Values that no cache can hold are written past the caches, which would read the old values first.
    const bool large = (end - begin) * BLOCK * int64_t(sizeof(T)) >= STREAMED;
    if (large && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
        for (int64_t b = begin; b < end; ++b) stream_values(out + b * BLOCK, codes(b), scale[b]);
        _mm_sfence();
        return;
    }
    for (int64_t b = begin; b < end; ++b) store_values(out + b * BLOCK, codes(b), scale[b]);
}

// The upper 16 bits of 32 floats. The last bit is set if one of the lower 16 bits is ("rounding to odd"), so that the
// result is above, at or below every number of up to 7 bits as the float is: the ties and bounds of E2M1 have 3 bits.
inline __m512i upper_halves(__m512i a, __m512i b) {
    const __m512i lower = _mm512_set1_epi32(0xFFFF), last = _mm512_set1_epi32(0x10000);
    a = _mm512_mask_or_epi32(a, _mm512_test_epi32_mask(a, lower), a, last);
    b = _mm512_mask_or_epi32(b, _mm512_test_epi32_mask(b, lower), b, last);
    const __m512i first = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000B0009, 0x000F000D, 0x00130011, 0x00170015,
                                            0x001B0019, 0x001F001D, 0x00230021, 0x00270025, 0x002B0029, 0x002F002D,
                                            0x00330031, 0x00370035, 0x003B0039, 0x003F003D);
    return _mm512_permutex2var_epi16(a, first, b);
}

// A block as bfloat16 rounded to odd, and as floats.
template <class T>
struct Block {
    __m512i patterns;
    __m512 floats[2];
};
template <>
struct Block<bfloat16> {
    __m512i patterns;
};
inline Block<bfloat16> load_block(const bfloat16* x) { return {_mm512_loadu_si512(x)}; }
inline Block<float> load_block(const float* x) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    return {upper_halves(_mm512_castps_si512(a), _mm512_castps_si512(b)), {a, b}};
}
inline Block<float> load_block(const float16* x) {
    alignas(64) float floats[BLOCK];
    _mm512_store_ps(floats, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
    _mm512_store_ps(floats + 16, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16))));
    return load_block(floats);
}

template <class T>
inline __m512i magnitudes(const Block<T>& x) {
    return _mm512_and_si512(x.patterns, _mm512_set1_epi16(0x7FFF));
}

inline int32_t largest(__m512i magnitudes) {
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(magnitudes), _mm512_extracti64x4_epi64(magnitudes, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // There is an instruction for the smallest of eight numbers.
    return 0xFFFF ^ _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1))), 0);
}

// The rule `mse` without rounding. With y = |x| / scale for the smaller scale, amax is in [4, 8). How much larger is the
// squared error with twice the scale, in units of the squared scale? Between 2 and 7 both round y to the same value.
// Below 2 one rounds to multiples of 1 and the other to multiples of 1/2. If d is the distance of y to 1/2 or 3/2,
// whichever is nearer, and d < 1/4, the errors are 1/2 - d and d, and the difference of their squares is 1/4 - d. Above 7
// one rounds to 8 and the other to 6, and the difference is (8 - y)^2 - (y - 6)^2 = -4 (y - 7). So the excess is a sum of
// linear functions. The general code compares sums with rounding errors below 2^-40: a larger excess has the same sign
// there.

// For bfloat16 the sum is exact in units of 2^-9. (y below 1/4 is taken for 0.)
inline int32_t better(const Block<bfloat16>& x, int32_t low) {
    const __m512i m = magnitudes(x), above = _mm512_sub_epi16(_mm512_srli_epi16(m, 7), _mm512_set1_epi16(low - 2));
    const __m512i mantissa = _mm512_or_si512(_mm512_and_si512(m, _mm512_set1_epi16(0x7F)), _mm512_set1_epi16(0x80));
    const __m512i y = _mm512_sllv_epi16(mantissa, above);  // a negative number shifts everything out
    const __m512i from_one = _mm512_abs_epi16(_mm512_sub_epi16(y, _mm512_set1_epi16(512)));
    const __m512i d = _mm512_abs_epi16(_mm512_sub_epi16(from_one, _mm512_set1_epi16(256)));
    const __m512i finer = _mm512_subs_epu16(_mm512_set1_epi16(128), d);
    const __m512i clipped = _mm512_slli_epi16(_mm512_subs_epu16(y, _mm512_set1_epi16(7 * 512)), 2);
    const __m512i pairs = _mm512_madd_epi16(_mm512_sub_epi16(finer, clipped), _mm512_set1_epi16(1));
    const int32_t excess = _mm512_reduce_add_epi32(pairs);
    return excess == 0 ? NOT_HERE : low + (excess < 0);
}

// For floats the sum has an error below 2^-14.
inline int32_t better(const Block<float>& x, int32_t low) {
    const __m512 inverse = _mm512_set1_ps(as_float((254 - low) << 23)), zero = _mm512_setzero_ps();
    __m512 sums[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 y = _mm512_mul_ps(_mm512_abs_ps(x.floats[i]), inverse);
        const __m512 from_one = _mm512_abs_ps(_mm512_sub_ps(y, _mm512_set1_ps(1)));
        const __m512 d = _mm512_abs_ps(_mm512_sub_ps(from_one, _mm512_set1_ps(0.5f)));
        const __m512 finer = _mm512_max_ps(_mm512_sub_ps(_mm512_set1_ps(0.25f), d), zero);
        const __m512 clipped = _mm512_max_ps(_mm512_sub_ps(y, _mm512_set1_ps(7)), zero);
        sums[i] = _mm512_fnmadd_ps(_mm512_set1_ps(4), clipped, finer);
    }
    const float excess = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    return std::fabs(excess) < 0x1p-12f ? NOT_HERE : low + (excess < 0);
}

template <int RULE, class T>
inline void exponents(const T* x, int64_t blocks, int32_t* exponent) {
    // Each loop is short for one block, so that the CPU works on many blocks at once.
    for (int64_t b = 0; b < blocks; ++b) {
        const int32_t e = (((largest(magnitudes(load_block(x + b * BLOCK))) << 16) + CARRY[RULE]) >> 23) - 2;
        exponent[b] = e < 3 || e > 249 ? NOT_HERE : e;
    }
    if (RULE != MSE) return;
    for (int64_t b = 0; b < blocks; ++b)
        if (exponent[b] != NOT_HERE) exponent[b] = better(load_block(x + b * BLOCK), exponent[b]);
}

// Return the codes in 16 bits each. The arithmetic is explained at `portable::rounded_pattern`.
template <class T>
inline __m512i codes(const T* from, int32_t exponent) {
    const auto x = load_block(from);
    const __m512i m = _mm512_sub_epi16(magnitudes(x), _mm512_set1_epi16(int16_t(exponent << 7)));
    const __m512i one = _mm512_set1_epi16(1), above = _mm512_max_epi16(m, _mm512_setzero_si512());
    __m512i sum = _mm512_add_epi16(above, _mm512_set1_epi16(31));
    sum = _mm512_mask_add_epi16(sum, _mm512_test_epi16_mask(above, _mm512_set1_epi16(0x40)), sum, one);
    __m512i code = _mm512_min_epi16(_mm512_srli_epi16(sum, 6), _mm512_set1_epi16(5));
    code = _mm512_mask_add_epi16(code, _mm512_cmpgt_epi16_mask(m, _mm512_set1_epi16(-0x100)), code, one);
    code = _mm512_mask_add_epi16(code, _mm512_cmpge_epi16_mask(m, _mm512_set1_epi16(-0x40)), code, one);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(x.patterns, 12), _mm512_set1_epi16(8));
    return _mm512_or_si512(code, sign);
}

template <class T>
inline void quantize(const T* x, int32_t exponent, uint8_t* packed) {
    const __m512i c = codes(x, exponent), pairs = _mm512_or_si512(c, _mm512_srli_epi32(c, 12));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(pairs));
}

template <class T>
inline void fake_quantize(const T* x, int32_t exponent, T* out) {
    store_values(out, codes(x, exponent), exponent);
}

}  // namespace avx512
