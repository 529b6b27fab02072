// lowra::moments: the sum of x y' over tokens, of bfloat16 values, in float32.
//
// vdpbf16ps multiplies pairs of tokens, so pairs lie interleaved: a panel holds COLUMNS columns,
// [pairs][COLUMNS] words of two tokens each. A tile of ROWS x COLUMNS sums stays in registers over
// BLOCK pairs. The sum of x x' is computed above its diagonal and mirrored.
#include <immintrin.h>

constexpr int64_t VECTORS = 3, COLUMNS = VECTORS * LANES, ROWS = 8, BLOCK = 256;

struct Panels {
    std::vector<uint32_t> words;
    int64_t pairs, columns, count;
    Panels(int64_t tokens, int64_t columns)
        : pairs((tokens + 1) / 2), columns(columns), count((columns + COLUMNS - 1) / COLUMNS) {
        words.resize(count * pairs * COLUMNS);
    }
    const uint32_t* at(int64_t panel, int64_t pair) const {
        return words.data() + (panel * pairs + pair) * COLUMNS;
    }
};

static void pack(Panels& to, const uint16_t* from, int64_t tokens, int threads) {
    parallel_rows(to.count, 1, threads, [&](int64_t panel, int64_t) {
        const int64_t first = panel * COLUMNS, used = std::min(COLUMNS, to.columns - first);
        uint32_t* word = const_cast<uint32_t*>(to.at(panel, 0));
        for (int64_t t = 0; t < tokens; t += 2, word += COLUMNS) {
            const uint16_t* low = from + t * to.columns + first;
            const uint16_t* high = low + to.columns;
            for (int64_t c = 0; c < used; c++)
                word[c] = low[c] | (t + 1 < tokens ? uint32_t(high[c]) << 16 : 0);
        }
    });
}

static __m512bh pairs_of(const uint32_t* word) { return (__m512bh)_mm512_loadu_si512(word); }
static __m512bh everywhere(uint32_t word) { return (__m512bh)_mm512_set1_epi32(int(word)); }

// sums[ROWS][COLUMNS] += x[pairs][ROWS]' y[pairs][COLUMNS], both inside panels. Summed from 0, so
// that rounding grows with a block and the number of blocks, not with their product.
static void add_tile(const uint32_t* x, const uint32_t* y, int64_t pairs, float* sums) {
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, x += COLUMNS, y += COLUMNS) {
        const __m512bh right[VECTORS] = {pairs_of(y), pairs_of(y + LANES), pairs_of(y + 2 * LANES)};
        for (int r = 0; r < ROWS; r++) {
            const __m512bh left = everywhere(x[r]);
            for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) {
            float* to = sums + r * COLUMNS + v * LANES;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
        }
}

// Panel i of x with panel j of y, to its place in result [.., width], and mirrored if asked.
static void write_tile(const Panels& x, int64_t i, const Panels& y, int64_t j, float* result,
                       int64_t width, bool mirrored) {
    float sums[COLUMNS * COLUMNS] = {};
    for (int64_t start = 0; start < x.pairs; start += BLOCK)
        for (int64_t r = 0; r < COLUMNS; r += ROWS)
            add_tile(x.at(i, start) + r, y.at(j, start), std::min(BLOCK, x.pairs - start),
                     sums + r * COLUMNS);
    for (int64_t r = 0; r < std::min(COLUMNS, x.columns - i * COLUMNS); r++)
        for (int64_t c = 0; c < std::min(COLUMNS, y.columns - j * COLUMNS); c++) {
            const int64_t row = i * COLUMNS + r, column = j * COLUMNS + c;
            result[row * width + column] = sums[r * COLUMNS + c];
            if (mirrored) result[column * width + row] = sums[r * COLUMNS + c];
        }
}

// x [tokens, n] and y [tokens, k], or y null for x itself -> result [n, k]
extern "C" void lowra_moments(const uint16_t* x, const uint16_t* y, float* result, int64_t tokens,
                              int64_t n, int64_t k, int threads) {
    Panels left(tokens, n), other(y ? tokens : 0, y ? k : 0);
    pack(left, x, tokens, threads);
    if (y) pack(other, y, tokens, threads);
    const Panels& right = y ? other : left;
    parallel_rows(left.count * right.count, 1, threads, [&](int64_t tile, int64_t) {
        const int64_t i = tile / right.count, j = tile % right.count;
        if (!y && j < i) return;
        write_tile(left, i, right, j, result, k, !y && j > i);
    });
}
