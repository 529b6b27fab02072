// Many tokens: blocks of stored rows are looked up into cache, sixteen side by side, and multiplied
// with every token. A lane sums a row by itself, so that nothing is left to reduce.

#ifdef LANES16
constexpr int SIDE = 16;

// Stored rows that lie side by side: where they belong and what turns their sums into y.
struct Beside {
    int64_t original[SIDE];  // -1 for a damaged one and for those past the block
    bool neighbours;         // in y too
    alignas(64) float step[SIDE], offset[SIDE], bias[SIDE];
};

static Beside beside(const Weight& w, const Call& c, const Panels& panels, int64_t first,
                     int64_t end) {
    Beside b{};
    std::fill(b.original, b.original + SIDE, -1);
    b.neighbours = end - first >= SIDE;
    for (const Panel& panel : panels)
        for (int64_t stored = std::max(first, panel.first);
             stored < std::min({end, panel.first + panel.rows, first + SIDE}); stored++) {
            const int64_t row = stored - panel.first, original = w.order[stored];
            const int64_t i = stored - first, table = w.shared ? 0 : 2 * row;
            const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
            b.step[i] = panel.affine[table] * scale;
            b.offset[i] = panel.affine[table + 1] * scale;
            if (uint64_t(original) < uint64_t(w.n)) b.original[i] = original;
            b.neighbours &= b.original[i] >= 0 && b.original[i] == b.original[0] + i;
            if (c.more.bias && b.original[i] >= 0)
                b.bias[i] = read(c.more.bias, original, c.more.bias_kind);
        }
    return b;
}

template <class T>
static inline void scatter(const Beside& b, const void* values, void* y, int64_t at) {
    for (int i = 0; i < SIDE; i++)
        if (b.original[i] >= 0)
            static_cast<T*>(y)[at + b.original[i]] = static_cast<const T*>(values)[i];
}
static void write_beside(const Weight& w, const Call& c, const Beside& b, int64_t token,
                         Floats values) {
    if (b.neighbours)
        return store_floats(values, 1, c.y, token * w.n, b.original[0], w.n, c.kind);
    alignas(64) uint8_t bytes[SIDE * 4];
    store_floats(values, 1, bytes, 0, 0, SIDE, c.kind);
    if (c.kind == FLOAT32) scatter<uint32_t>(b, bytes, c.y, token * w.n);
    else scatter<uint16_t>(b, bytes, c.y, token * w.n);
}

// What tokens are multiplied with: x [tokens, PARTS], `stride` bytes apart, of `steps` words.
struct Inputs {
    const uint8_t* x;
    int64_t stride, steps;
};

// A block: `values` [steps, VECTORS, SIDE] of 4 bytes, B' of its rows [rank, VECTORS, SIDE].
template <int VECTORS>
struct Block {
    Beside rows[VECTORS];
    const uint8_t* values;
    const float* factors;
};

template <int VECTORS, int M>
static void finish_block(const Weight& w, const Call& c, const Tokens& t,
                         const Block<VECTORS>& block, int64_t token,
                         const Floats (&sums)[VECTORS][M]) {
    for (int m = 0; m < M; m++, token++) {
        const Quantized& number = t.numbers[token];
        const float* hidden = t.hidden + token * hidden_stride(t.rank);
        for (int v = 0; v < VECTORS; v++) {
            const Beside& rows = block.rows[v];
            Floats y = times(scaled(sums[v][m], number.scale), rows.step);
            y = add_scaled(y, rows.offset, number.scale * number.sum);
            for (int64_t r = 0; r < t.rank; r++)
                y = add_scaled(y, block.factors + (r * VECTORS + v) * SIDE, hidden[r]);
            write_beside(w, c, rows, token, add_scaled(y, rows.bias, 1));
        }
    }
}

// A block with M tokens. Indices of sums are known to the compiler, as in few_tokens.
template <int VECTORS, int M>
static void block_tokens(const Weight& w, const Call& c, const Tokens& t, const Inputs& inputs,
                         const Block<VECTORS>& block, int64_t token) {
    constexpr int INPUTS = M * PARTS;
    Lanes sums[VECTORS * INPUTS];
    each_step<VECTORS * INPUTS>([&](auto i) INLINE { sums[i] = zeros(); });
    const uint8_t* x = inputs.x + token * PARTS * inputs.stride;
    const uint8_t* values = block.values;
    for (int64_t step = 0; step < inputs.steps; step++, x += 4, values += VECTORS * 64) {
        Lanes looked_up[VECTORS];
        each_step<VECTORS>([&](auto v) INLINE { looked_up[v] = load_lanes(values + v * 64); });
        each_step<INPUTS>([&](auto i) INLINE {
            const Lanes input = everywhere(x + i * inputs.stride);
            each_step<VECTORS>([&](auto v) INLINE {
                add_dot(sums[v * INPUTS + i], looked_up[v], input);
            });
        });
    }
    Floats whole[VECTORS][M];
    each_step<VECTORS * M>([&](auto which) INLINE {
        constexpr int v = decltype(which)::value / M, m = decltype(which)::value % M;
        const Lanes parts[2] = {sums[which * PARTS], sums[which * PARTS + PARTS - 1]};
        whole[v][m] = as_floats<PARTS>(parts);
    });
    finish_block<VECTORS, M>(w, c, t, block, token, whole);
}

#ifdef TILES
// A block with as many tokens as two sets of inputs hold: of two parts, a set is one part of all.
constexpr int TILED = 2 * TILE_TOKENS / PARTS;

template <int VECTORS>
static void block_tiles(const Weight& w, const Call& c, const Tokens& t, const Inputs& inputs,
                        const Block<VECTORS>& block, int64_t token) {
    constexpr int TOGETHER = 4;
    const uint8_t* x = inputs.x + token * PARTS * inputs.stride;
    const uint8_t* const sets[2] = {x, x + (PARTS == 2 ? 1 : TILE_TOKENS) * inputs.stride};
    alignas(64) uint8_t sums[2][VECTORS][TILE_TOKENS][SIDE * 4];
    tile_sums<VECTORS>(sets, PARTS * inputs.stride, block.values, inputs.steps, sums);
    for (int i = 0; i < TILED; i += TOGETHER) {
        Floats whole[VECTORS][TOGETHER];
        for (int v = 0; v < VECTORS; v++)
            for (int m = 0; m < TOGETHER; m++) {
                const int at = (i + m) % TILE_TOKENS, first = (i + m) / TILE_TOKENS;
                const Lanes parts[2] = {load_lanes(sums[first][v][at]),
                                        load_lanes(sums[1][v][at])};
                whole[v][m] = as_floats<PARTS>(parts);
            }
        finish_block<VECTORS, TOGETHER>(w, c, t, block, token + i, whole);
    }
}
#endif

// Rows first .. end, at most VECTORS * SIDE, side by side; rows past them repeat the last.
template <int VECTORS>
static void lay(const Weight& w, const Panels& panels, int64_t first, int64_t end,
                const Inputs& inputs, uint8_t* row_bytes, uint8_t* out) {
    for (int v = 0; v < VECTORS; v++) {
        for (int i = 0; i < SIDE; i++) {
            const int64_t stored = std::min(first + v * SIDE + i, end - 1);
            for (const Panel& panel : panels)
                if (stored >= panel.first && stored < panel.first + panel.rows)
                    expand_of_width(w, panel, stored - panel.first, row_bytes + i * inputs.stride);
        }
        for (int64_t step = 0; step < inputs.steps; step += 16)
            transpose(row_bytes + step * 4, inputs.stride, out + (step * VECTORS + v) * 64,
                      VECTORS * 64);
    }
}

template <int VECTORS>
static void block_of(const Weight& w, const Call& c, const Tokens& t, const Panels& panels,
                     const Inputs& inputs, int64_t first, int64_t end) {
    constexpr int TOGETHER = BLOCK_INPUTS / PARTS;
    const int64_t laid = VECTORS * inputs.steps * 64, apart = SIDE * inputs.stride;
    uint8_t* memory = reinterpret_cast<uint8_t*>(
        scratch<OF_ROWS>(laid + apart + t.rank * VECTORS * SIDE * 4));
    float* factors = reinterpret_cast<float*>(memory + laid + apart);
    Block<VECTORS> block{{}, memory, factors};
    for (int v = 0; v < VECTORS; v++) {
        const Beside rows = block.rows[v] = beside(w, c, panels, first + v * SIDE, end);
        for (int64_t r = 0; r < t.rank; r++)
            for (int i = 0; i < SIDE; i++)
                factors[(r * VECTORS + v) * SIDE + i] =
                    rows.original[i] < 0
                        ? 0
                        : read(c.more.b, rows.original[i] * t.rank + r, c.more.factor_kind);
    }
    lay<VECTORS>(w, panels, first, end, inputs, memory + laid, memory);
    int64_t m = 0;
#ifdef TILES
    const WholeTiles tiles;
    for (; m + TILED <= c.m; m += TILED) block_tiles<VECTORS>(w, c, t, inputs, block, m);
#endif
    for (; m + TOGETHER <= c.m; m += TOGETHER)
        block_tokens<VECTORS, TOGETHER>(w, c, t, inputs, block, m);
    for (; m + 2 <= c.m; m += 2) block_tokens<VECTORS, 2>(w, c, t, inputs, block, m);
    for (; m < c.m; m++) block_tokens<VECTORS, 1>(w, c, t, inputs, block, m);
}

// Neighbouring stored rows that read activations in one order.
struct Run {
    int64_t first, rows;
    bool ternary, looked_up;
};

static int runs_of(const Weight& w, const Panels& panels, Run (&runs)[MOST_PANELS]) {
    int count = 0;
    for (const Panel& panel : panels) {
        const Run run{panel.first, panel.rows, panel.width == TERNARY,
                      expand_of_width(w, panel, 0, nullptr)};
        Run* last = count ? runs + count - 1 : nullptr;
        if (last && last->ternary == run.ternary && last->looked_up == run.looked_up)
            last->rows += run.rows;
        else if (run.rows)
            runs[count++] = run;
    }
    return count;
}

// All rows with many tokens; threads take blocks in turn.
static void rows_by_blocks(const Weight& w, const Call& c, const Tokens& t, const Panels& panels) {
    constexpr int64_t MOST_ROWS = BLOCK_VECTORS * SIDE;
    Run runs[MOST_PANELS];
    const int count = runs_of(w, panels, runs);
    const Inputs arranged{t.inputs, t.lanes * 4, filled_lanes(w.k, ELEMENT)};
    const Inputs natural{reinterpret_cast<const uint8_t*>(t.natural), natural_bytes(w.k),
                         aligned(w.k) / 4};
    int64_t blocks = 0;
    for (int i = 0; i < count; i++) blocks += (runs[i].rows + MOST_ROWS - 1) / MOST_ROWS;
    parallel_rows(blocks, 1, c.threads, [&](int64_t block, int64_t) {
        const Run* run = runs;
        for (int64_t own; block >= (own = (run->rows + MOST_ROWS - 1) / MOST_ROWS); run++)
            block -= own;
        const int64_t first = run->first + block * MOST_ROWS;
        const int64_t end = std::min(first + MOST_ROWS, run->first + run->rows);
        const Inputs& inputs = run->ternary ? natural : arranged;
        if (!run->looked_up) stored_rows(w, c, t, panels, first, end);
        else if (end - first > SIDE) block_of<BLOCK_VECTORS>(w, c, t, panels, inputs, first, end);
        else block_of<1>(w, c, t, panels, inputs, first, end);
    });
}
#endif
