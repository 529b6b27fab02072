// Rows of three levels. Five digits to base 3 lie in a byte, as a fraction of 256: the digit that
// leads is told by two comparisons, and three times the byte, less whole numbers, has the next.

struct Digits {  // one of 64 bytes each
    __m512i rest;
    __mmask64 here;
};

static inline int64_t tile_bytes(int64_t k, int64_t k0) {
    return (std::min(TERNARY_TILE, k - k0) + 19) / 20 * 4;
}
static inline Digits first_digits(const uint8_t* bytes, int64_t count) {
    const __mmask64 here = count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    return {_mm512_maskz_loadu_epi8(here, bytes), here};
}
static inline void next_digits(Digits& d) {
    d.rest = _mm512_add_epi8(d.rest, _mm512_add_epi8(d.rest, d.rest));
}
// Bytes zero, one or two where the digit is 0, 1 or 2; 0 past the tile.
static inline __m512i choose_level(const Digits& d, __m512i zero, __m512i one, __m512i two) {
    const __mmask64 some = _mm512_cmpge_epu8_mask(d.rest, _mm512_set1_epi8(86));
    const __mmask64 full = _mm512_cmpge_epu8_mask(d.rest, _mm512_set1_epi8(char(171)));
    const __m512i level = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(d.here, zero), some, one);
    return _mm512_mask_mov_epi8(level, full, two);
}
static inline const uint8_t* ternary_row(const Panel& panel, int64_t row, int64_t k) {
    return reinterpret_cast<const uint8_t*>(panel.words + row * row_words(k, TERNARY));
}

template <int M>
[[maybe_unused]] static void ternary_block(const Weight& w, const Call& c, const Tokens& t,
                                           const Panel& panel, int64_t row, int64_t end,
                                           int64_t token) {
    const uint8_t* bytes[BLOCK];
    __m512i levels[BLOCK][3];
    Lanes sums[BLOCK][M][PARTS];
    int64_t rows[BLOCK];
    for (int r = 0; r < BLOCK; r++) {
        rows[r] = std::min(row + r, end - 1);
        bytes[r] = ternary_row(panel, rows[r], w.k);
        const uint8_t* table = panel.tables + (w.shared ? 0 : rows[r] * table_bytes(TERNARY));
        for (int i = 0; i < 3; i++) levels[r][i] = _mm512_set1_epi8(char(table[i]));
        for (int m = 0; m < M; m++)
            for (int p = 0; p < PARTS; p++) sums[r][m][p] = Lanes{};
    }
    const int64_t stride = natural_bytes(w.k), ahead = BLOCK * 4 * row_words(w.k, TERNARY);
    const int8_t* x = t.natural + token * PARTS * stride;
    for (int64_t k0 = 0; k0 < w.k; k0 += TERNARY_TILE) {
        const int64_t count = tile_bytes(w.k, k0);
        Digits digits[BLOCK];
        for (int r = 0; r < BLOCK; r++) {
            digits[r] = first_digits(bytes[r], count);
            fetch(bytes[r] + ahead);
            bytes[r] += count;
        }
        for (int f = 0; f < 5; f++)
            for (int r = 0; r < BLOCK; r++) {
                const Lanes values =
                    choose_level(digits[r], levels[r][0], levels[r][1], levels[r][2]);
                for (int m = 0; m < M; m++)
                    for (int p = 0; p < PARTS; p++)
                        sums[r][m][p] = dot(sums[r][m][p], values,
                                            reinterpret_cast<const uint8_t*>(
                                                x + (m * PARTS + p) * stride + k0 + f * count));
                next_digits(digits[r]);
            }
    }
    finish_block<M>(w, c, t, panel, rows, sums, row, end, token);
}

[[maybe_unused]] static void ternary_rows(const Weight& w, const Call& c, const Tokens& t,
                                          const Panel& panel, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += BLOCK) {
        int64_t m = 0;
        for (; m + MOST_TOKENS <= c.m; m += MOST_TOKENS)
            ternary_block<MOST_TOKENS>(w, c, t, panel, row, end, m);
        for (; m < c.m; m++) ternary_block<1>(w, c, t, panel, row, end, m);
    }
}

// As values_of; the first column of the part begins a ternary tile.
[[maybe_unused]] static void ternary_values(const Weight& w, const Panel& panel, int64_t row,
                                            const Part& part, int64_t at) {
    const uint8_t* bytes = ternary_row(panel, row, w.k) + part.first_column / 5;
    const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
    const Lanes table =
        spread<16>(panel.tables + (w.shared ? 0 : row * table_bytes(TERNARY)));
    const __m512i one = _mm512_set1_epi8(1), two = _mm512_set1_epi8(2);
    at -= part.first_column;
    for (int64_t k0 = part.first_column; k0 < part.last_column; k0 += TERNARY_TILE) {
        const int64_t count = tile_bytes(w.k, k0);
        Digits digits = first_digits(bytes, count);
        bytes += count;
        for (int f = 0; f < 5; f++, next_digits(digits)) {
            alignas(64) uint8_t codes[64];
            _mm512_store_si512(codes, choose_level(digits, __m512i{}, one, two));
            const int64_t column = k0 + f * count;
            for (int64_t i = 0; i < count; i += 16) {
                const Lanes index = _mm512_cvtepu8_epi32(
                    _mm_load_si128(reinterpret_cast<const __m128i*>(codes + i)));
                const Lanes values = _mm512_permutexvar_epi32(index, table);
                store_floats(_mm512_castsi512_ps(values), scale, part.out, at, column + i,
                             std::min(part.last_column, column + count), part.kind);
            }
        }
    }
}
