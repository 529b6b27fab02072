// y = x W' + bias + scaling (x A') B' for few tokens: tokens are prepared once, then threads take
// blocks of stored rows; a block reads its codes once for every four tokens.

struct Tokens {               // what rows read, in thread-local memory of the caller
    const float* rotated;     // [m, k]
    const uint8_t* inputs;    // [m, PARTS, lanes] of 4 bytes
    const int8_t* natural;    // [m, PARTS, natural_bytes] in the order of columns; bytes only
    const Quantized* numbers; // [m]
    const float* hidden;      // [m, rank padded to 16]: scaling * x A'
    int64_t lanes, rank;
    bool exact;
};

static int64_t hidden_stride(int64_t rank) { return (rank + 15) / 16 * 16; }

static void finish(const Weight& w, const Call& c, int64_t stored, int64_t token, float value) {
    const int64_t row = w.order[stored];
    if (uint64_t(row) >= uint64_t(w.n)) return;  // a damaged order writes nothing
    if (c.bias) value += read(c.bias, row, c.bias_kind);
    write(c.y, token * w.n + row, c.kind, value);
}

static void exact_row(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                      int64_t row, std::vector<uint8_t>& codes, std::vector<float>& values) {
    codes.resize(size_t(padded(w.k)));
    values.resize(size_t(w.k));
    row_values(w, panel, row, codes.data(), values.data());
    const int64_t stored = panel.first + row, original = w.order[stored];
    if (uint64_t(original) >= uint64_t(w.n)) return;
    for (int64_t m = 0; m < c.m; m++) {
        float sum = dot_floats(t.rotated + m * w.k, values.data(), w.k);
        const float* hidden = t.hidden + m * hidden_stride(t.rank);
        for (int64_t r = 0; r < t.rank; r++)
            sum += hidden[r] * read(c.b, original * t.rank + r, c.factor_kind);
        finish(w, c, stored, m, sum);
    }
}

#ifdef LANES16
constexpr int BLOCK = 4;
constexpr int64_t CACHE_BYTES = 256 << 10;  // of activations, in a core's second cache

struct Tail {
    int words, narrow_words, steps;  // of a short tile: words of its planes, steps of 16 lanes
    TailStep wide[4 * ELEMENT], narrow[4 * ELEMENT];  // of the (first) plane; of a plane of 1 bit
};

static void plan_steps(int64_t lanes, int bits, int to, TailStep* steps) {
    const int64_t words = lanes * 4 / ELEMENT * bits / WORD;
    for (int64_t i = 0; i < (lanes + 15) / 16 * 16; i++) {
        const int64_t lane = std::min(i, lanes - 1);
        steps[i / 16].word[i % 16] = uint32_t(lane % words);
        steps[i / 16].shift[i % 16] = uint32_t(lane / words * bits - to) & 31;
    }
}

// Kept for the last length of a tail, since planning takes as long as some rows.
template <int width>
static const Tail& plan_tail(int64_t k) {
    thread_local Tail tail{};
    thread_local int64_t planned = 0;
    const int64_t columns = padded(k) % TILE, lanes = columns * ELEMENT / 4;
    if (planned == columns) return tail;
    planned = columns;
    tail = Tail{};
    if (!columns) return tail;
    tail.steps = int((lanes + 15) / 16);
    tail.words = int(columns * (width == 3 ? 2 : width) / WORD);
    tail.narrow_words = int(columns / WORD);
    plan_steps(lanes, width == 3 ? 2 : width, 0, tail.wide);
    if (width == 3) plan_steps(lanes, 1, 2, tail.narrow);
    return tail;
}

// From sums to y, for the rows of a block that come before `end`.
template <int M>
static void finish_block(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                         const int64_t (&rows)[BLOCK], const Lanes (&sums)[BLOCK][M][PARTS],
                         int64_t row, int64_t end, int64_t token) {
    float step[BLOCK], offset[BLOCK];
    for (int r = 0; r < BLOCK; r++) {
        const float* affine = panel.affine + (w.shared ? 0 : 2 * rows[r]);
        const float scale = w.scales ? from_float16(panel.scales[rows[r]]) : 1.0f;
        step[r] = affine[0] * scale;
        offset[r] = affine[1] * scale;
    }
    for (int m = 0; m < M; m++) {
        const Quantized& number = t.numbers[token + m];
        Floats lanes[BLOCK];
        float totals[BLOCK];
        for (int r = 0; r < BLOCK; r++) {
            lanes[r] = scaled(as_floats<PARTS>(sums[r][m]), step[r] * number.scale);
            const int64_t original = w.order[panel.first + rows[r]];
            if (uint64_t(original) >= uint64_t(w.n)) continue;
            for (int64_t at = 0; at < t.rank; at += 16)
                lanes[r] = add_products(lanes[r], c.b, original * t.rank + at, c.factor_kind,
                                        t.hidden + (token + m) * hidden_stride(t.rank) + at,
                                        t.rank - at);
        }
        sum_lanes(lanes, totals);
        for (int r = 0; r < BLOCK && row + r < end; r++)
            finish(w, c, panel.first + row + r, token + m,
                   totals[r] + offset[r] * number.scale * number.sum);
    }
}

// M tokens from `token` on with BLOCK rows from `row` on; rows past `end` repeat the last.
template <class Codes, int M>
static void row_block(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                      const Tail& tail, int64_t row, int64_t end, int64_t token) {
    constexpr int TABLE = ELEMENT << Codes::WIDTH;
    Codes codes[BLOCK];
    Lanes tables[BLOCK], sums[BLOCK][M][PARTS];
    const uint8_t* x[M][PARTS];
    int64_t rows[BLOCK];
    for (int r = 0; r < BLOCK; r++) {
        rows[r] = std::min(row + r, end - 1);
        codes[r].open(panel, rows[r], w.k);
        tables[r] = spread<TABLE>(panel.tables + (w.shared ? 0 : rows[r] * TABLE));
        for (int m = 0; m < M; m++)
            for (int p = 0; p < PARTS; p++) sums[r][m][p] = Lanes{};
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < PARTS; p++)
            x[m][p] = t.inputs + ((token + m) * PARTS + p) * t.lanes * 4;
    const int64_t tiles = padded(w.k) / TILE, ahead = BLOCK * row_words(w.k, Codes::PLANE);
    for (int64_t tile = 0; tile < tiles; tile++) {
        for (int r = 0; r < BLOCK; r++) codes[r].load(ahead);
        each_step<4 * ELEMENT>([&](auto step) __attribute__((always_inline)) {
            constexpr int S = decltype(step)::value;
            for (int r = 0; r < BLOCK; r++) {
                const Lanes values = look_up(tables[r], codes[r].template at<S>());
                for (int m = 0; m < M; m++)
                    for (int p = 0; p < PARTS; p++)
                        sums[r][m][p] = dot(sums[r][m][p], values, x[m][p] + S * 64);
            }
        });
        for (int m = 0; m < M; m++)
            for (int p = 0; p < PARTS; p++) x[m][p] += 256 * ELEMENT;
    }
    for (int s = 0; s < tail.steps; s++)
        for (int r = 0; r < BLOCK; r++) {
            const Lanes values = look_up(tables[r], codes[r].tail(tail, s));
            for (int m = 0; m < M; m++)
                for (int p = 0; p < PARTS; p++)
                    sums[r][m][p] = dot(sums[r][m][p], values, x[m][p] + s * 64);
        }
    finish_block<M>(w, c, t, panel, rows, sums, row, end, token);
}

// Values of a stored row, looked up in float32: the columns of a part.
template <class Codes>
static void values_of(const Weight& w, const Panel& panel, int64_t row, const Part& part,
                      int64_t at) {
    constexpr int TABLE = ELEMENT << Codes::WIDTH;
    const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
    const Lanes table = spread<TABLE>(panel.tables + (w.shared ? 0 : row * TABLE));
    Codes codes;
    codes.open(panel, row, w.k);
    codes.skip(part.first_column / TILE);
    int64_t column = part.first_column;
    const int64_t end = std::min(part.last_column, padded(w.k) / TILE * TILE);
    at -= part.first_column;
    for (; column < end; column += TILE) {
        codes.load(row_words(w.k, Codes::PLANE));
        each_step<4 * ELEMENT>([&](auto step) __attribute__((always_inline)) {
            constexpr int S = decltype(step)::value;
            const Lanes looked_up = look_up(table, codes.template at<S>());
            store_floats(as_floats<1>(&looked_up), scale, part.out, at, column + S * 16,
                         part.last_column, part.kind);
        });
    }
    if (column >= part.last_column) return;
    const Tail& tail = plan_tail<Codes::WIDTH>(w.k);
    for (int s = 0; s < tail.steps; s++) {
        const Lanes looked_up = look_up(table, codes.tail(tail, s));
        store_floats(as_floats<1>(&looked_up), scale, part.out, at, column + s * 16,
                     part.last_column, part.kind);
    }
}

// Tokens in blocks that stay in cache while the rows of a chunk pass.
template <class Codes>
static void rows_of(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                    int64_t begin, int64_t end) {
    const Tail& tail = plan_tail<Codes::WIDTH>(w.k);
    const int64_t together = std::max<int64_t>(
        MOST_TOKENS, CACHE_BYTES / (PARTS * t.lanes * 4) / MOST_TOKENS * MOST_TOKENS);
    for (int64_t first = 0; first < c.m; first += together)
        for (int64_t row = begin; row < end; row += BLOCK) {
            const int64_t last = std::min(c.m, first + together);
            int64_t m = first;
            for (; m + MOST_TOKENS <= last; m += MOST_TOKENS)
                row_block<Codes, MOST_TOKENS>(w, c, t, panel, tail, row, end, m);
            for (; m < last; m++) row_block<Codes, 1>(w, c, t, panel, tail, row, end, m);
        }
}
#endif

static bool rows_of_width(const Weight&, const Call&, const Tokens&, const Panel&, int64_t,
                          int64_t);  // emitted below

// Stored rows begin .. end, which may span panels.
static void stored_rows(const Weight& w, const Call& c, const Tokens& t,
                        const std::vector<Panel>& panels, int64_t begin, int64_t end) {
    std::vector<uint8_t> codes;
    std::vector<float> values;
    for (const Panel& panel : panels) {
        const int64_t from = std::max<int64_t>(begin - panel.first, 0);
        const int64_t to = std::min(end - panel.first, panel.rows);
        if (from >= to) continue;
        if (!t.exact && rows_of_width(w, c, t, panel, from, to)) continue;
        for (int64_t row = from; row < to; row++) exact_row(w, c, t, panel, row, codes, values);
    }
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static Quantized prepare(const Weight& w, const float* rotated, int64_t lanes, int8_t* inputs,
                         [[maybe_unused]] int8_t* natural,
                         [[maybe_unused]] std::vector<float>& floats) {
    std::memset(inputs, 0, size_t(PARTS * lanes * 4));  // padding adds nothing
    if constexpr (ELEMENT == 1) {
        return quantize<PARTS == 2>(rotated, w.k, inputs, inputs + lanes * 4, natural);
    } else {
        floats.assign(size_t(padded(w.k)), 0.0f);
        std::memcpy(floats.data(), rotated, size_t(w.k) * 4);
        if constexpr (ELEMENT == 4) {
            std::memcpy(inputs, floats.data(), floats.size() * 4);
        } else {
            std::vector<uint16_t> halves(floats.size());
            for (size_t i = 0; i < floats.size(); i++) halves[i] = to_bfloat16(floats[i]);
            arrange<uint16_t, 2>(halves.data(), w.k, reinterpret_cast<uint16_t*>(inputs));
        }
        return {1, 0, false};
    }
}

// Tokens few enough for the caches.
static void slab(const Weight& w, const Call& c) {
    const int64_t lanes = token_lanes(w.k, ELEMENT), stride = hidden_stride(c.rank);
    const int64_t inputs_at = aligned(c.m * w.k * 4);
    const int64_t numbers_at = inputs_at + aligned(c.m * PARTS * lanes * 4 + 64);
    const int64_t natural_at = numbers_at + aligned(c.m * int64_t(sizeof(Quantized)));
    const int64_t natural_stride = ELEMENT == 1 ? PARTS * natural_bytes(w.k) : 0;
    const int64_t hidden_at = natural_at + c.m * natural_stride;
    thread_local std::vector<char> memory;
    const size_t wanted = size_t(hidden_at + c.m * stride * 4 + 64);
    if (memory.size() < wanted) memory.resize(wanted);
    char* base = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    float* rotated = reinterpret_cast<float*>(base);
    int8_t* inputs = reinterpret_cast<int8_t*>(base + inputs_at);
    Quantized* numbers = reinterpret_cast<Quantized*>(base + numbers_at);
    int8_t* natural = reinterpret_cast<int8_t*>(base + natural_at);
    float* hidden = reinterpret_cast<float*>(base + hidden_at);

    const int threads = c.m * w.n * w.k < 200000 ? 1 : c.threads;
    std::memset(hidden, 0, size_t(c.m * stride * 4));
    const int few = c.m * w.k * (c.rank + 8) < 200000 ? 1 : c.threads;
    parallel_rows(c.m + c.rank, 1, few, [&](int64_t begin, int64_t end) {
        std::vector<float> x(size_t(w.k)), a(size_t(w.k));
        for (int64_t i = begin; i < end; i++) {
            if (i < c.m) {
                float* token = rotated + i * w.k;
                read_row(c.x, i * c.x_stride, c.kind, w.k, token);
                rotate(w, token);
                numbers[i] = prepare(w, token, lanes, inputs + i * PARTS * lanes * 4,
                                     natural + i * natural_stride, x);
                continue;
            }
            const int64_t r = i - c.m;
            read_row(c.a, r * w.k, c.factor_kind, w.k, a.data());
            x.resize(size_t(w.k));
            for (int64_t m = 0; m < c.m; m++) {
                read_row(c.x, m * c.x_stride, c.kind, w.k, x.data());
                hidden[m * stride + r] = c.scaling * dot_floats(x.data(), a.data(), w.k);
            }
        }
    });
    bool exact = false;
    for (int64_t m = 0; m < c.m; m++) exact |= numbers[m].exact;
    const Tokens tokens{rotated, reinterpret_cast<const uint8_t*>(inputs), natural, numbers, hidden,
                        lanes, c.rank, exact};
    const std::vector<Panel> panels = panels_of(w);
    parallel_rows(w.n, 32, threads, [&](int64_t begin, int64_t end) {
        stored_rows(w, c, tokens, panels, begin, end);
    });
}

extern "C" void lowra_product(Weight* weight, const Call* call) {
    derive(*weight);
    constexpr int64_t SLAB = 256;
    const int64_t bytes = call->kind == FLOAT32 ? 4 : 2;
    for (int64_t m = 0; m < call->m; m += SLAB) {
        Call part = *call;
        part.x = static_cast<const char*>(call->x) + m * call->x_stride * bytes;
        part.y = static_cast<char*>(call->y) + m * weight->n * bytes;
        part.m = std::min(SLAB, call->m - m);
        slab(*weight, part);
    }
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

static bool values_of_width(const Weight&, const Panel&, int64_t, const Part&, int64_t);  // below

// Part of W [n, k] in its kind: rows in original order, columns as they are stored; the first
// column begins a tile.
extern "C" void lowra_values(Weight* weight, const Part* wanted, int threads) {
    const Weight& w = *weight;
    const Part& part = *wanted;
    const int64_t width = part.last_column - part.first_column;
    derive(*weight);
    const std::vector<Panel> panels = panels_of(w);
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
