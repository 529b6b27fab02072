// y = x W' + bias + scaling (x A') B' for few tokens: tokens are prepared once, then threads take
// batches of stored rows.

#ifdef LANES16
template <class Codes>
static void rows_of(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                    int64_t begin, int64_t end) {
    const Tail& tail = plan_tail<Codes::BITS>(w.k);
    for (int64_t row = begin; row < end; row += ROWS) {
        const Batch b = batch_of(w, panel, row, end, ROWS);
        int64_t m = 0;
        for (; m + MOST_TOKENS <= c.m; m += MOST_TOKENS)
            batched<MOST_TOKENS>(w, c, t, b, m, [&](int at, Floats (&sums)[MOST_TOKENS][ROWS]) {
                few_tokens<Codes, MOST_TOKENS>(w, t, panel, tail, b, at, m, sums);
            });
        for (; m < c.m; m++)
            batched<1>(w, c, t, b, m, [&](int at, Floats (&sums)[1][ROWS]) {
                few_tokens<Codes, 1>(w, t, panel, tail, b, at, m, sums);
            });
    }
}
#endif

static bool rows_of_width(const Weight&, const Call&, const Tokens&, const Panel&, int64_t,
                          int64_t);  // emitted below
static bool expand_of_width(const Weight&, const Panel&, int64_t, uint8_t*);  // likewise

// Stored rows begin .. end, which may span panels.
static void stored_rows(const Weight& w, const Call& c, const Tokens& t, const Panels& panels,
                        int64_t begin, int64_t end) {
    for (const Panel& panel : panels) {
        const int64_t from = std::max<int64_t>(begin - panel.first, 0);
        const int64_t to = std::min(end - panel.first, panel.rows);
        if (from >= to) continue;
        if (!t.exact && rows_of_width(w, c, t, panel, from, to)) continue;
        char* memory = scratch<OF_EXACT_ROW>(padded(w.k) * 5);
        for (int64_t row = from; row < to; row++)
            exact_row(w, c, t, panel, row, reinterpret_cast<uint8_t*>(memory + padded(w.k) * 4),
                      reinterpret_cast<float*>(memory));
    }
}

static bool all_looked_up(const Weight& w, const Panels& panels) {
    for (const Panel& panel : panels)
        if (!expand_of_width(w, panel, 0, nullptr)) return false;
    return true;
}

static void rows_by_blocks(const Weight&, const Call&, const Tokens&, const Panels&);  // blocks.h

// Of multiplications: with fewer, waking a second thread costs more than it saves.
constexpr int64_t ALONE = 2000000;

// Tokens up to which rows are multiplied as they are looked up.
constexpr int64_t FEW = 8;

constexpr int64_t SLAB_BYTES = 4 << 20;

// Tokens few enough for the caches.
static void slab(const Weight& w, const Call& c) {
    const Panels panels = panels_of(w);
    const auto prepared = [&](bool floats) {
        const Places places(w, c, floats);
        return prepare_tokens(w, c, places, scratch<OF_TOKENS>(places.total));
    };
    Tokens tokens = prepared(!all_looked_up(w, panels));
    if (tokens.exact && !tokens.rotated) tokens = prepared(true);
#ifdef LANES16
    if (c.m > FEW && !tokens.exact) return rows_by_blocks(w, c, tokens, panels);
#endif
    if (c.m * w.n * w.k < ALONE) return stored_rows(w, c, tokens, panels, 0, w.n);
    // Long pieces, since memory is waited for where one begins, but several for every thread.
    const int64_t piece = std::min<int64_t>(128, w.n / (8 * c.threads)) / 32 * 32;
    parallel_rows(w.n, std::max<int64_t>(32, piece), c.threads, [&](int64_t begin, int64_t end) {
        stored_rows(w, c, tokens, panels, begin, end);
    });
}

// x [m, k], rows `x_stride` apart, to y [m, n], both of `kind`.
extern "C" void lowra_product(Weight* weight, const Extras* extras, const void* x, void* y,
                              int64_t m, int64_t x_stride, Kind kind, int threads) {
    // So many together as the last cache may hold, and enough of them to pay for looking up.
    const int64_t room = SLAB_BYTES / (padded(weight->k) * PARTS * ELEMENT);
    const int64_t most = std::min<int64_t>(256, std::max<int64_t>(64, room));
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    derive(*weight);
    for (int64_t at = 0; at < m; at += most)
        slab(*weight, Call{static_cast<const char*>(x) + at * x_stride * bytes,
                           static_cast<char*>(y) + at * weight->n * bytes,
                           std::min(most, m - at), x_stride, kind, threads, *extras});
}
