// y = x W' + bias + scaling (x A') B' for few tokens: tokens are prepared once, then threads take
// batches of stored rows.

#ifdef LANES16
template <class Codes>
static void rows_of(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                    int64_t begin, int64_t end) {
    const Tail& tail = plan_tail<Codes::WIDTH>(w.k);
    if (c.m > 2 * MOST_TOKENS)
        return expanded_rows(w, c, t, panel, begin, end, t.inputs, t.lanes * 4, t.lanes * 4,
                             [&](int64_t row, uint8_t* out) {
                                 expand_row<Codes>(w, panel, tail, row, out);
                             });
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

// Of multiplications: with fewer, waking a second thread costs more than it saves.
constexpr int64_t ALONE = 2000000;

// Tokens few enough for the caches.
static void slab(const Weight& w, const Call& c) {
    const Places places(w, c);
    const Tokens tokens = prepare_tokens(w, c, places, scratch<OF_TOKENS>(places.total));
    const Panels panels = panels_of(w);
    if (c.m * w.n * w.k < ALONE) return stored_rows(w, c, tokens, panels, 0, w.n);
    parallel_rows(w.n, 32, c.threads, [&](int64_t begin, int64_t end) {
        stored_rows(w, c, tokens, panels, begin, end);
    });
}

// x [m, k], rows `x_stride` apart, to y [m, n], both of `kind`.
extern "C" void lowra_product(Weight* weight, const Extras* extras, const void* x, void* y,
                              int64_t m, int64_t x_stride, Kind kind, int threads) {
    constexpr int64_t SLAB = 256;
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    derive(*weight);
    for (int64_t at = 0; at < m; at += SLAB)
        slab(*weight, Call{static_cast<const char*>(x) + at * x_stride * bytes,
                           static_cast<char*>(y) + at * weight->n * bytes,
                           std::min(SLAB, m - at), x_stride, kind, threads, *extras});
}

// x [m, k], rows `stride` apart, to out [m, k] of its kind: rotated or, where `back`, rotated back.
extern "C" void lowra_turn(const Weight* weight, const void* x, int64_t stride, void* out,
                           int64_t m, Kind kind, int back, int threads) {
    const Weight& w = *weight;
    parallel_rows(m, 8, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> token(size_t(w.k));
        for (int64_t row = begin; row < end; row++) {
            read_row(x, row * stride, kind, w.k, token.data());
            if (back) {
                hadamard(token.data(), w.k, w.block);
                for (int64_t i = 0; i < w.k; i++) token[i] *= w.signs[i];
            } else {
                rotate(w, token.data());
            }
            write_row(out, row * w.k, kind, w.k, token.data());
        }
    });
}
