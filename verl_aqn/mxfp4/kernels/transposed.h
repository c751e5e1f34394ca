// Dequantisation of W [N, K] to the bfloat16 W^T: the product with W of a backward pass then reads its rows in order.
// Included by native.cpp.

// Write rows n .. n + rows - 1 (at most 32) of column block k of W to columns of out, whose rows have `width` elements.
inline void transpose_tile(const uint8_t* packed, const uint8_t* scale, int64_t columns, int64_t n, int64_t rows,
                           int64_t k, uint16_t* out, int64_t width) {
    alignas(64) bfloat16 tile[BLOCK][BLOCK];
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t block = (n + r) * columns + k;
        shortcut::dequantize(packed + block * (BLOCK / 2), scale + block, 0, 1, tile[r]);
    }
    for (int i = 0; i < BLOCK; ++i)
        for (int64_t r = 0; r < rows; ++r) out[i * width + r] = tile[r][i].bits;
}

#ifdef AQN_AVX512
// Read 16 bytes of each of 16 rows: bytes 4 i to 4 i + 3 of row r become element r of quarters[i].
inline void read_rows(const uint8_t* from, int64_t stride, __m512i* quarters) {
    __m512i rows[4];  // rows[q] has rows q, 4 + q, 8 + q, 12 + q
    for (int q = 0; q < 4; ++q) {
        const auto row = [=](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride)); };
        rows[q] = _mm512_castsi128_si512(row(q));
        rows[q] = _mm512_inserti32x4(rows[q], row(4 + q), 1);
        rows[q] = _mm512_inserti32x4(rows[q], row(8 + q), 2);
        rows[q] = _mm512_inserti32x4(rows[q], row(12 + q), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    quarters[0] = _mm512_unpacklo_epi64(a, b), quarters[1] = _mm512_unpackhi_epi64(a, b);
    quarters[2] = _mm512_unpacklo_epi64(c, d), quarters[3] = _mm512_unpackhi_epi64(c, d);
}

// As `transpose_tile` for 32 rows. Returns false if a scale is at an end of the range.
inline bool transpose_quickly(const uint8_t* packed, const uint8_t* scale, int64_t columns, int64_t n, int64_t k,
                              uint16_t* out, int64_t width) {
    alignas(64) int16_t shifts[BLOCK];  // of each row: the scale without its bias, in a bfloat16's exponent field
    bool ordinary = true;
    for (int r = 0; r < BLOCK; ++r) {
        const int s = scale[(n + r) * columns + k];
        ordinary &= s >= 2 && s <= 252;
        shifts[r] = int16_t((s - 127) * 128);
    }
    if (!ordinary) return false;
    const __m512i shift = _mm512_load_si512(shifts);
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i even = _mm512_or_si512(_mm512_slli_epi32(row, 2), _mm512_set1_epi32(0x00020000));
    const __m512i lower = _mm512_add_epi16(even, _mm512_slli_epi32(row, 18));  // words 0, 2, ... 62
    const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(1));
    const int64_t stride = columns * (BLOCK / 2);
    const uint8_t* from = packed + n * stride + k * (BLOCK / 2);
    __m512i first[4], second[4];
    read_rows(from, stride, first);
    read_rows(from + 16 * stride, stride, second);
    for (int i = 0; i < 4; ++i) {  // four bytes of every row are eight codes
        for (int half = 0; half < 2; ++half) {
            __m512i codes = _mm512_permutex2var_epi16(first[i], half ? upper : lower, second[i]);
            for (int j = 0; j < 4; ++j) {
                const __m512i unscaled = avx512::look_up(avx512::tables.brain[127], codes);
                const __mmask32 not_zero = _mm512_test_epi16_mask(unscaled, _mm512_set1_epi16(0x7FFF));
                _mm512_storeu_si512(out + (8 * i + 4 * half + j) * width,
                                    _mm512_mask_add_epi16(unscaled, not_zero, unscaled, shift));
                codes = _mm512_srli_epi16(codes, 4);
            }
        }
    }
    return true;
}
#else
inline bool transpose_quickly(const uint8_t*, const uint8_t*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {
    return false;
}
#endif

// Write column blocks begin .. end - 1 of W [rows, columns * 32] to their rows of out [columns * 32, rows].
inline void dequantize_transposed(const uint8_t* packed, const uint8_t* scale, int64_t rows, int64_t columns,
                                  int64_t begin, int64_t end, uint16_t* out) {
    constexpr int64_t STRIP = 1024;  // rows whose cache lines stay in the cache for the next column block
    for (int64_t strip = 0; strip < rows; strip += STRIP)
        for (int64_t k = begin; k < end; ++k)
            for (int64_t n = strip; n < rows && n < strip + STRIP; n += BLOCK) {
                uint16_t* to = out + k * BLOCK * rows + n;
                const int64_t some = rows - n < BLOCK ? rows - n : BLOCK;
                if (some < BLOCK || !transpose_quickly(packed, scale, columns, n, k, to, rows))
                    transpose_tile(packed, scale, columns, n, some, k, to, rows);
            }
}
