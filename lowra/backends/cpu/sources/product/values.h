// Weights unpacked for products of torch: parts of W in its kind.

#ifdef LANES16
// Values of a stored row, looked up in float32: the columns of a part.
template <class Codes>
static void values_of(const Weight& w, const Panel& panel, int64_t row, const Part& part,
                      int64_t at) {
    constexpr int TABLE = ELEMENT * Codes::LEVELS;
    const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
    const Lanes table = spread<TABLE>(panel.tables + (w.shared ? 0 : row * TABLE));
    Codes codes;
    codes.open(panel, row, w.k);
    codes.skip(part.first_column / TILE);
    int64_t column = part.first_column;
    const int64_t end = std::min(part.last_column, padded(w.k) / TILE * TILE);
    at -= part.first_column;
    for (; column < end; column += TILE) {
        fetch_ahead<8 * Codes::PLANE>(codes.words[0] + row_words(w.k, Codes::PLANE));
        codes.load();
        each_step<4 * ELEMENT>([&](auto step) INLINE {
            constexpr int S = decltype(step)::value;
            const Lanes looked_up = look_up<Codes::CLEAR>(table, codes.template at<S>());
            store_floats(floats_of(looked_up), scale, part.out, at, column + S * 16,
                         part.last_column, part.kind);
        });
    }
    if (column >= part.last_column) return;
    const Tail& tail = plan_tail<Codes::BITS>(w.k);
    for (int s = 0; s < tail.steps; s++) {
        const Lanes looked_up = look_up<Codes::CLEAR>(table, codes.tail(tail, s));
        store_floats(floats_of(looked_up), scale, part.out, at, column + s * 16,
                     part.last_column, part.kind);
    }
}
#endif

static bool values_of_width(const Weight&, const Panel&, int64_t, const Part&, int64_t);  // below

// Part of W [n, k] in its kind: rows in original order, columns as they are stored; the first
// column begins a tile.
extern "C" void lowra_values(Weight* weight, const Part* wanted, int threads) {
    const Weight& w = *weight;
    const Part& part = *wanted;
    const int64_t width = part.last_column - part.first_column;
    derive(*weight);
    const Panels panels = panels_of(w);
    parallel_rows(w.n, 64, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(size_t(padded(w.k)));
        std::vector<float> values(size_t(w.k));
        for (const Panel& panel : panels)
            for (int64_t row = std::max<int64_t>(begin - panel.first, 0);
                 row < std::min(end - panel.first, panel.rows); row++) {
                const int64_t original = w.order[panel.first + row];
                if (original < part.first_row || original >= part.last_row) continue;
                const int64_t at = (original - part.first_row) * width;
                if (values_of_width(w, panel, row, part, at)) continue;
                row_values(w, panel, row, codes.data(), values.data());
                write_row(part.out, at, part.kind, width, values.data() + part.first_column);
            }
    });
}

// x [m, k], rows `stride` apart, to out [m, k] of its kind: rotated or, where `back`, rotated back.
extern "C" void lowra_turn(const Weight* weight, const void* x, int64_t stride, void* out,
                           int64_t m, Kind kind, int back, int threads) {
    const Weight& w = *weight;
    parallel_rows(m, 8, threads, [&](int64_t begin, int64_t end) {
        float* token = reinterpret_cast<float*>(scratch<OF_PLAIN_TOKEN>(w.k * 4));
        for (int64_t row = begin; row < end; row++) {
            read_row(x, row * stride, kind, w.k, token);
            if (back) {
                hadamard(token, w.k, w.block);
                for (int64_t i = 0; i < w.k; i++) token[i] *= w.signs[i];
            } else {
                rotate(w, token);
            }
            write_row(out, row * w.k, kind, w.k, token);
        }
    });
}
