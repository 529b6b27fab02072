// Rows of three levels. Five digits to base 3 lie in a byte, as a fraction of 256: the digit that
// leads is told by two comparisons, and three times the byte, less whole numbers, has the next.

static inline int64_t tile_bytes(int64_t k, int64_t k0) {
    return (std::min(TERNARY_TILE, k - k0) + 19) / 20 * 4;
}
static inline const uint8_t* ternary_row(const Panel& panel, int64_t row, int64_t k) {
    return reinterpret_cast<const uint8_t*>(panel.words + row * row_words(k, TERNARY));
}

struct Levels {
    Lanes at[3];
};
static Levels levels_of_row(const Weight& w, const Panel& panel, int64_t row) {
    const uint8_t* table = panel.tables + (w.shared ? 0 : row * table_bytes(TERNARY));
    return {{bytes_of(table[0]), bytes_of(table[1]), bytes_of(table[2])}};
}
static inline Lanes leading(const Digits& d, const Levels& levels) {
    return choose_level(d, levels.at[0], levels.at[1], levels.at[2]);
}

// As few_tokens.
template <int M>
[[maybe_unused]] static void ternary_block(const Weight& w, const Tokens& t, const Panel& panel,
                                           const Batch& b, int at, int64_t token,
                                           Floats (&out)[M][ROWS]) {
    constexpr int INPUTS = M * PARTS;
    const uint8_t* bytes[BLOCK];
    Levels levels[BLOCK];
    Lanes sums[BLOCK][INPUTS] = {};
    for (int r = 0; r < BLOCK; r++) {
        const int64_t row = b.first + std::min(at + r, b.count - 1);
        bytes[r] = ternary_row(panel, row, w.k);
        levels[r] = levels_of_row(w, panel, row);
    }
    const int64_t stride = natural_bytes(w.k);
    const uint8_t* next = bytes[0] + 4 * ahead(w.k, TERNARY);
    const uint8_t* x = reinterpret_cast<const uint8_t*>(t.natural) + token * PARTS * stride;
    for (int64_t k0 = 0; k0 < w.k; k0 += TERNARY_TILE) {
        const int64_t count = tile_bytes(w.k, k0);
        Digits digits[BLOCK];
        each_step<BLOCK>([&](auto row) INLINE {
            constexpr int r = decltype(row)::value;
            digits[r] = first_digits(bytes[r], count);
            fetch(next + r * 64);
            bytes[r] += count;
        });
        next += BLOCK * 64;
        for (int f = 0; f < 5; f++, x += count)
            each_step<BLOCK>([&](auto row) INLINE {
                constexpr int r = decltype(row)::value;
                const Lanes values = leading(digits[r], levels[r]);
                each_step<INPUTS>([&](auto part) INLINE {
                    constexpr int i = decltype(part)::value;
                    add_dot(sums[r][i], values, load_lanes(x + i * stride));
                });
                next_digits(digits[r]);
            });
    }
    each_step<BLOCK * M>([&](auto which) INLINE {
        constexpr int r = decltype(which)::value / M, m = decltype(which)::value % M;
        out[m][at + r] = as_floats<PARTS>(sums[r] + m * PARTS);
    });
}

// The elements of a row in the order of columns; `out` has room for natural_bytes(k).
[[maybe_unused]] static void expand_ternary(const Weight& w, const Panel& panel, int64_t row,
                                            uint8_t* out) {
    const uint8_t* bytes = ternary_row(panel, row, w.k);
    const Levels levels = levels_of_row(w, panel, row);
    for (int64_t k0 = 0; k0 < w.k; k0 += TERNARY_TILE) {
        const int64_t count = tile_bytes(w.k, k0);
        Digits digits = first_digits(bytes, count);
        bytes += count;
        for (int f = 0; f < 5; f++, next_digits(digits))
            store_lanes(out + k0 + f * count, leading(digits, levels));
    }
}

[[maybe_unused]] static void ternary_rows(const Weight& w, const Call& c, const Tokens& t,
                                          const Panel& panel, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += ROWS) {
        const Batch b = batch_of(w, panel, row, end, ROWS);
        int64_t m = 0;
        for (; m + MOST_TOKENS <= c.m; m += MOST_TOKENS)
            batched<MOST_TOKENS>(w, c, t, b, m, [&](int at, Floats (&sums)[MOST_TOKENS][ROWS]) {
                ternary_block<MOST_TOKENS>(w, t, panel, b, at, m, sums);
            });
        for (; m < c.m; m++)
            batched<1>(w, c, t, b, m, [&](int at, Floats (&sums)[1][ROWS]) {
                ternary_block<1>(w, t, panel, b, at, m, sums);
            });
    }
}

// As values_of; the first column of the part begins a ternary tile.
[[maybe_unused]] static void ternary_values(const Weight& w, const Panel& panel, int64_t row,
                                            const Part& part, int64_t at) {
    const uint8_t* bytes = ternary_row(panel, row, w.k) + part.first_column / 5;
    const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
    const Lanes table = spread<16>(panel.tables + (w.shared ? 0 : row * table_bytes(TERNARY)));
    const Levels numbers{{bytes_of(0), bytes_of(1), bytes_of(2)}};
    at -= part.first_column;
    for (int64_t k0 = part.first_column; k0 < part.last_column; k0 += TERNARY_TILE) {
        const int64_t count = tile_bytes(w.k, k0);
        Digits digits = first_digits(bytes, count);
        bytes += count;
        for (int f = 0; f < 5; f++, next_digits(digits)) {
            alignas(64) uint8_t codes[64];
            store_lanes(codes, leading(digits, numbers));
            const int64_t column = k0 + f * count;
            for (int64_t i = 0; i < count; i += 16)
                store_floats(floats_of(look_up(table, widened(codes + i))), scale, part.out, at,
                             column + i, std::min(part.last_column, column + count), part.kind);
        }
    }
}
