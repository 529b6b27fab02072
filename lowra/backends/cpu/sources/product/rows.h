// Sixteen stored rows at a time: sums of looked-up values times activations, lane by lane, then
// one reduction for all, and y. Many tokens: blocks.h.

static void finish(const Weight& w, const Call& c, int64_t stored, int64_t token, float value) {
    const int64_t row = w.order[stored];
    if (uint64_t(row) >= uint64_t(w.n)) return;  // a damaged order writes nothing
    if (c.more.bias) value += read(c.more.bias, row, c.more.bias_kind);
    write(c.y, token * w.n + row, c.kind, value);
}

static void exact_row(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                      int64_t row, uint8_t* codes, float* values) {
    row_values(w, panel, row, codes, values);
    const int64_t stored = panel.first + row, original = w.order[stored];
    if (uint64_t(original) >= uint64_t(w.n)) return;
    for (int64_t m = 0; m < c.m; m++) {
        float sum = dot_floats(t.rotated + m * padded(w.k), values, w.k);
        const float* hidden = t.hidden + m * hidden_stride(t.rank);
        for (int64_t r = 0; r < t.rank; r++)
            sum += hidden[r] * read(c.more.b, original * t.rank + r, c.more.factor_kind);
        finish(w, c, stored, m, sum);
    }
}

#ifdef LANES16
constexpr int ROWS = 16;

struct Tail {
    int steps;                       // of 16 lanes in a short tile
    TailWords words, narrow_words;   // of its planes
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
template <int BITS>
static const Tail& plan_tail(int64_t k) {
    thread_local Tail tail{};
    thread_local int64_t planned = 0;
    const int64_t columns = padded(k) % TILE, lanes = columns * ELEMENT / 4;
    if (planned == columns) return tail;
    planned = columns;
    tail = Tail{};
    if (!columns) return tail;
    tail.steps = int((lanes + 15) / 16);
    tail.words = tail_words(int(columns * first_plane(BITS) / WORD));
    tail.narrow_words = tail_words(int(columns / WORD));
    plan_steps(lanes, int(first_plane(BITS)), 0, tail.wide);
    if (BITS == 3) plan_steps(lanes, 1, 2, tail.narrow);
    return tail;
}

struct Batch {  // `count` neighbouring stored rows of a panel
    int64_t first;
    int count;
    int64_t original[ROWS];  // -1 for a damaged one
    float step[ROWS], offset[ROWS];
};

static Batch batch_of(const Weight& w, const Panel& panel, int64_t first, int64_t end, int most) {
    Batch b{first, int(std::min<int64_t>(most, end - first)), {}, {}, {}};
    const int64_t stride = w.shared ? 0 : 2;
    for (int r = 0; r < b.count; r++) {
        const int64_t row = first + r, original = w.order[panel.first + row];
        const float scale = w.scales ? from_float16(panel.scales[row]) : 1.0f;
        b.original[r] = uint64_t(original) < uint64_t(w.n) ? original : -1;
        b.step[r] = panel.affine[stride * row] * scale;
        b.offset[r] = panel.affine[stride * row + 1] * scale;
    }
    return b;
}

static void write_rows(const Weight& w, const Call& c, const Batch& b, int64_t token,
                       float* values) {
    if (c.more.bias)
        for (int r = 0; r < b.count; r++)
            if (b.original[r] >= 0)
                values[r] += read(c.more.bias, b.original[r], c.more.bias_kind);
    const int64_t at = token * w.n;
    if (c.kind == FLOAT32) {
        for (int r = 0; r < b.count; r++)
            if (b.original[r] >= 0) static_cast<float*>(c.y)[at + b.original[r]] = values[r];
        return;
    }
    uint16_t halves[ROWS];
    write_row(halves, 0, c.kind, ROWS, values);
    for (int r = 0; r < b.count; r++)
        if (b.original[r] >= 0) static_cast<uint16_t*>(c.y)[at + b.original[r]] = halves[r];
}

// From sums to y for one token; R is ROWS or BLOCK.
template <int R>
static void finish_rows(const Weight& w, const Call& c, const Tokens& t, const Batch& b,
                        const Floats (&sums)[R], int64_t token) {
    const Quantized& number = t.numbers[token];
    const float* hidden = t.hidden + token * hidden_stride(t.rank);
    Floats lanes[std::max(R, 4)] = {};
    alignas(64) float values[ROWS] = {};
    for (int r = 0; r < R; r++) lanes[r] = scaled(sums[r], b.step[r] * number.scale);
    if (t.rank)
        for (int r = 0; r < b.count; r++)
            for (int64_t at = 0; at < t.rank && b.original[r] >= 0; at += 16)
                lanes[r] = add_products(lanes[r], c.more.b, b.original[r] * t.rank + at,
                                        c.more.factor_kind, hidden + at, t.rank - at);
    if constexpr (R == ROWS) sum_batch(lanes, values);
    else for (int r = 0; r < R; r += 4) sum_lanes(lanes + r, values + r);
    const float base = number.scale * number.sum;
    for (int r = 0; r < R; r++) values[r] += b.offset[r] * base;
    write_rows(w, c, b, token, values);
}

// Words from what is read to what is fetched: two blocks of rows, and where rows are short so many
// bytes as memory delivers while one access to it lasts.
static inline int64_t ahead(int64_t k, int64_t bits) {
    return std::max<int64_t>(2 * BLOCK * row_words(k, bits), 1024);
}

// In the order of memory, whatever the order of reading: the rest of the machine likes that best.
template <int WORDS, bool NEAR = false>
static inline INLINE const uint32_t* fetch_ahead(const uint32_t* from) {
    for (int i = 0; i < WORDS; i += 16) fetch<NEAR>(from + i);
    return from + WORDS;
}

// Sums of BLOCK rows from b.first + at on with M tokens; rows past the batch repeat the last.
// Indices of sums are known to the compiler (`each_step`), or it would keep them in memory.
template <class Codes, int M>
static void few_tokens(const Weight& w, const Tokens& t, const Panel& panel, const Tail& tail,
                       const Batch& b, int at, int64_t token, Floats (&out)[M][ROWS]) {
    constexpr int TABLE = ELEMENT * Codes::LEVELS, INPUTS = M * PARTS;
    constexpr int VECTORS = Codes::CLEAR || Codes::BITS > 2 ? 2 : 1;  // of what a tile unpacks to
    Codes codes[BLOCK];
    Lanes tables[BLOCK], sums[BLOCK][INPUTS] = {};
    for (int r = 0; r < BLOCK; r++) {
        const int64_t row = b.first + std::min(at + r, b.count - 1);
        codes[r].open(panel, row, w.k);
        tables[r] = spread<TABLE>(panel.tables + (w.shared ? 0 : row * TABLE));
    }
    const int64_t stride = t.lanes * 4;
    const uint32_t* next = codes[0].words[0] + ahead(w.k, Codes::PLANE);
    [[maybe_unused]] const uint32_t* high = next;  // of the plane of 1 bit
    if constexpr (Codes::BITS == 3) high = codes[0].words[1] + ahead(w.k, 1);
    const uint8_t* x = t.inputs + token * PARTS * stride;
    for (int64_t tile = 0; tile < padded(w.k) / TILE; tile++, x += 256 * ELEMENT) {
        next = fetch_ahead<BLOCK * 8 * Codes::PLANE, Codes::BITS == 1>(next);
        if constexpr (Codes::BITS == 3) high = fetch_ahead<BLOCK * 8>(high);
        const auto multiply = [&](auto row, auto step) INLINE {
            constexpr int r = decltype(row)::value, S = decltype(step)::value;
            const Lanes values = look_up<Codes::CLEAR>(tables[r], codes[r].template at<S>());
            each_step<INPUTS>([&](auto part) INLINE {
                constexpr int i = decltype(part)::value;
                add_row_dot(sums[r][i], values, load_lanes(x + i * stride + S * 64));
            });
        };
        if constexpr (IN_TURN && VECTORS > 1) {
            each_step<BLOCK>([&](auto row) INLINE {
                codes[decltype(row)::value].load();
                each_step<4 * ELEMENT>([&](auto step) INLINE { multiply(row, step); });
            });
        } else {
            each_step<BLOCK>([&](auto row) INLINE { codes[decltype(row)::value].load(); });
            each_step<4 * ELEMENT>([&](auto step) INLINE {
                each_step<BLOCK>([&](auto row) INLINE { multiply(row, step); });
            });
        }
    }
    for (int s = 0; s < tail.steps; s++, x += 64)
        each_step<BLOCK>([&](auto row) INLINE {
            constexpr int r = decltype(row)::value;
            const Lanes values = look_up<Codes::CLEAR>(tables[r], codes[r].tail(tail, s));
            each_step<INPUTS>([&](auto part) INLINE {
                constexpr int i = decltype(part)::value;
                add_row_dot(sums[r][i], values, load_lanes(x + i * stride));
            });
        });
    each_step<BLOCK * M>([&](auto which) INLINE {
        constexpr int r = decltype(which)::value / M, m = decltype(which)::value % M;
        out[m][at + r] = as_floats<PARTS>(sums[r] + m * PARTS);
    });
}

// The elements of a stored row, in the order of a token's.
template <class Codes>
static void expand_row(const Weight& w, const Panel& panel, int64_t row, uint8_t* out) {
    const Tail& tail = plan_tail<Codes::BITS>(w.k);
    constexpr int TABLE = ELEMENT * Codes::LEVELS;
    const Lanes table = spread<TABLE>(panel.tables + (w.shared ? 0 : row * TABLE));
    Codes codes;
    codes.open(panel, row, w.k);
    for (int64_t tile = 0; tile < padded(w.k) / TILE; tile++, out += 256 * ELEMENT) {
        fetch_ahead<8 * Codes::PLANE>(codes.words[0] + ahead(w.k, Codes::PLANE));
        codes.load();
        each_step<4 * ELEMENT>([&](auto step) INLINE {
            constexpr int S = decltype(step)::value;
            store_lanes(out + S * 64, look_up<Codes::CLEAR>(table, codes.template at<S>()));
        });
    }
    for (int s = 0; s < tail.steps; s++)
        store_lanes(out + s * 64, look_up<Codes::CLEAR>(table, codes.tail(tail, s)));
}

// Sums of a batch of rows: block(at) fills `out` from row `at` of the batch on.
template <int M, class Block>
static void batched(const Weight& w, const Call& c, const Tokens& t, const Batch& b, int64_t token,
                    const Block& block) {
    Floats sums[M][ROWS];
    if (b.count < ROWS) std::memset(static_cast<void*>(sums), 0, sizeof(sums));
    for (int at = 0; at < b.count; at += BLOCK) block(at, sums);
    for (int m = 0; m < M; m++) finish_rows<ROWS>(w, c, t, b, sums[m], token + m);
}

#endif
