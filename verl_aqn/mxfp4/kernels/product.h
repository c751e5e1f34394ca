// The product of bfloat16 activations with a packed weight and an adapter: y = x W^T + (x A^T) B^T + bias.
// Included by native.cpp. The weight is dequantised in registers, four rows at a time: a product of few tokens then
// reads a quarter of the bytes that a bfloat16 weight has.
//
// One result is the sum of the same products in the same order, however many tokens and threads there are: a token's
// result does not depend on what else is in the batch. Sums are float32. x W^T + bias, x A^T and y are rounded to
// bfloat16, as where a layer and its adapter are computed one after the other.

#if defined(AQN_AVX512) && defined(__AVX512BF16__) && defined(_OPENMP)
#define AQN_PRODUCT

namespace product {

constexpr int ROWS = 4, TOKENS = 4;      // of a tile: 16 sums stay in registers
constexpr int64_t CACHED = 512 * 1024;  // bytes of x that stay in a core's second cache while the rows of W pass
constexpr int64_t NEAR = 24 * 1024;     // bytes of decoded rows of W that stay in its first cache

// Element i of the result is the sum of the elements of a[i].
inline __m512 sums(const __m512* a) {
    __m512 twos[8], fours[4];
    for (int i = 0; i < 8; ++i)
        twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(twos[2 * i]), y = _mm512_castps_pd(twos[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const auto fold = [](__m512 x, __m512 y) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
    };
    return fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
}

// Add the products of `tokens` rows of x with ROWS rows of w, both of `length` elements; sums[ROWS * t + r].
template <int tokens, class Load>
inline __attribute__((always_inline)) void add_block(const uint16_t* const* w, const uint16_t* x, int64_t stride,
                                                     int64_t k, Load load, __m512* sum) {
    __m512bh row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = load(w[r] + k);
    for (int t = 0; t < tokens; ++t) {
        const __m512bh values = load(x + t * stride + k);
        for (int r = 0; r < ROWS; ++r) sum[ROWS * t + r] = _mm512_dpbf16_ps(sum[ROWS * t + r], row[r], values);
    }
}
template <int tokens>
inline __attribute__((always_inline)) void add_products(const uint16_t* const* w, const uint16_t* x, int64_t stride,
                                                        int64_t length, __m512* sum) {
    const uint16_t* const row[ROWS] = {w[0], w[1], w[2], w[3]};
    int64_t k = 0;
    for (; k + 32 <= length; k += 32)
        add_block<tokens>(row, x, stride, k, [](const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }, sum);
    if (k == length) return;
    const __mmask32 rest = (__mmask32(1) << (length - k)) - 1;
    add_block<tokens>(
        row, x, stride, k, [=](const uint16_t* from) { return (__m512bh)_mm512_maskz_loadu_epi16(rest, from); }, sum);
}

// What is multiplied: x [T, K] with rows of a weight, and, if `rank` is not 0, inner [T, rank] with rows of B.
struct Input {
    const uint16_t *x, *inner;
    int64_t width, rank;
};

// Write y[t, 0 .. rows - 1] for `tokens` tokens from `token` on. y has `stride` columns.
template <int tokens>
inline void tile(const Input& in, int64_t token, const uint16_t* const* w, const uint16_t* const* b, __m512 bias,
                 uint16_t* y, int64_t stride, int rows) {
    const auto rounded_sum = [](const __m512* sum, __m512 added) {
        return (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums(sum), added));
    };
    __m512 sum[ROWS * TOKENS];
    for (__m512& one : sum) one = _mm512_setzero_ps();
    add_products<tokens>(w, in.x + token * in.width, in.width, in.width, sum);
    __m256i total = rounded_sum(sum, bias);
    if (in.rank) {
        for (__m512& one : sum) one = _mm512_setzero_ps();
        add_products<tokens>(b, in.inner + token * in.rank, in.rank, in.rank, sum);
        total = rounded_sum(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(total), 16)));
    }
    alignas(32) uint16_t rounded[ROWS * TOKENS];
    _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), total);
    for (int t = 0; t < tokens; ++t) std::memcpy(y + (token + t) * stride, rounded + ROWS * t, 2 * rows);
}

// ROWS rows of the weight and of B, of which the first `rows` exist, and where their results go.
struct Rows {
    const uint16_t *w[ROWS], *b[ROWS];
    __m512 bias;
    uint16_t* y;
    int rows;
};

inline void tiles(const Input& in, int64_t token, int64_t tokens, const Rows* groups, int64_t number, int64_t stride) {
    for (int64_t g = 0; g < number; ++g) {
        const Rows& of = groups[g];
        switch (tokens) {
            case 1: tile<1>(in, token, of.w, of.b, of.bias, of.y, stride, of.rows); break;
            case 2: tile<2>(in, token, of.w, of.b, of.bias, of.y, stride, of.rows); break;
            case 3: tile<3>(in, token, of.w, of.b, of.bias, of.y, stride, of.rows); break;
            default: tile<TOKENS>(in, token, of.w, of.b, of.bias, of.y, stride, of.rows);
        }
    }
}

inline __m512 bias_of(const uint16_t* bias, int rows) {
    float values[ROWS] = {};
    if (bias)
        for (int r = 0; r < rows; ++r) values[r] = as_float(int32_t(uint32_t(bias[r]) << 16));
    return _mm512_broadcast_f32x4(_mm_loadu_ps(values));
}

inline int rows_at(int64_t n, int64_t all) { return int(all - n < ROWS ? all - n : ROWS); }

void compute(const uint8_t* packed, const uint8_t* scale, int64_t n, int64_t k, const uint16_t* x, int64_t tokens,
             const uint16_t* bias, const uint16_t* a, const uint16_t* b, int64_t rank, uint16_t* inner, uint16_t* y,
             int threads) {
    const int64_t blocks = k / BLOCK, limit = CACHED / (2 * k) / TOKENS * TOKENS, chunk = limit < TOKENS ? TOKENS : limit;
    // Few tokens stay in the first cache themselves; then four rows are dequantised while those before are multiplied.
    const int64_t fit = tokens * 2 * k <= NEAR ? 1 : NEAR / (2 * k * ROWS), most = fit < 1 ? 1 : fit > 16 ? 16 : fit;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<uint16_t> memory;
        if (memory.size() < size_t(most * ROWS * k + 32)) memory.resize(most * ROWS * k + 32);
        uint16_t* decoded = memory.data();
        while (reinterpret_cast<uintptr_t>(decoded) % 64) ++decoded;
        Rows groups[16];
        for (int64_t begin = 0; begin < tokens; begin += chunk) {
            const int64_t end = begin + chunk < tokens ? begin + chunk : tokens;
            if (rank) {
#pragma omp for schedule(static)
                for (int64_t r = 0; r < rank; r += ROWS) {
                    Rows& of = groups[0];
                    of.rows = rows_at(r, rank), of.bias = _mm512_setzero_ps(), of.y = inner + r;
                    for (int i = 0; i < ROWS; ++i) of.w[i] = a + (r + (i < of.rows ? i : 0)) * k;
                    for (int64_t t = begin; t < end; t += TOKENS)
                        tiles({x, nullptr, k, 0}, t, end - t, groups, 1, rank);
                }
            }
#pragma omp for schedule(static)
            for (int64_t first = 0; first < n; first += most * ROWS) {
                int64_t number = 0;
                for (int64_t r = first; r < n && number < most; r += ROWS, ++number) {
                    Rows& of = groups[number];
                    of.rows = rows_at(r, n), of.bias = bias_of(bias ? bias + r : nullptr, of.rows), of.y = y + r;
                    for (int i = 0; i < ROWS; ++i) {
                        const int64_t from = r + (i < of.rows ? i : 0);
                        uint16_t* row = decoded + (number * ROWS + i) * k;
                        shortcut::dequantize(packed + from * blocks * (BLOCK / 2), scale + from * blocks, 0, blocks,
                                             reinterpret_cast<bfloat16*>(row));
                        of.w[i] = row, of.b[i] = b + from * rank;
                    }
                }
                for (int64_t t = begin; t < end; t += TOKENS) tiles({x, inner, k, rank}, t, end - t, groups, number, n);
            }
        }
    }
}

}  // namespace product
#endif
