// lowra::apply_adapters: adapters as they lie in pages, mixed in one batch.
//
// A task is one adapter and up to TOKENS of its tokens: each row of A is unpacked once and multiplied
// with all of them, then each row of B. A token belongs to one task of a round, so no two write to
// the same sums; a batch with several adapters per token takes a round for each place.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int TOKENS = 8, ROLES = 6, LEVELS = 16;
constexpr int A = 0, B = 1, CORE = 2, DIAGONAL = 3, OUT = 4, POST = 5;
constexpr int TERNARY = 9, ZERO_POINTS = 16, FLOAT = 32, HALF = 33, BFLOAT = 34;
constexpr int64_t TILE = 256, TERNARY_TILE = 320;
typedef float Vector __attribute__((vector_size(4 * LANES)));

struct Chunk { int32_t role, first, rows, format, columns, group, at; };

static int64_t up(int64_t value, int64_t by) { return (value + by - 1) / by; }
static int64_t row_words(int64_t columns, int id) {
    return id == TERNARY ? up(columns, 20) : up(columns, 32) * id;
}
static int64_t groups_of(const Chunk& c) { return c.group < 0 ? 1 : up(c.columns, c.group); }
static int64_t dense_words(const Chunk& c) { return c.format == FLOAT ? c.columns : up(c.columns, 2); }

static bool known(int format) {
    const int id = format % ZERO_POINTS;
    if (format > BFLOAT) return false;
    if (format >= FLOAT) return true;
    return format > ZERO_POINTS ? id >= 2 && id <= 4 : (id >= 1 && id <= 4) || id == TERNARY;
}

static bool sound(const Chunk& c, int64_t words) {
    if (c.role < 0 || c.role >= ROLES || c.first < 0 || c.rows < 1 || c.columns < 1 || c.at < 0 ||
        !known(c.format) || c.group == 0 || c.group < -1)
        return false;
    if (c.format >= FLOAT) return c.at + c.rows * dense_words(c) <= words;
    const int64_t scales = c.rows * groups_of(c);
    const int64_t zeros = c.format > ZERO_POINTS ? up(scales * (c.format - ZERO_POINTS), 32) : 0;
    return c.at + c.rows * row_words(c.columns, c.format % ZERO_POINTS) + up(scales, 2) + zeros <= words;
}

static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static float half(uint16_t bits) {
    const uint32_t size = bits & 0x7fff, sign = uint32_t(bits & 0x8000) << 16;
    const float value = from_bits(size << 13) * 0x1p112f;
    return size >= 0x7c00 ? from_bits(sign | 0x7f800000 | size << 13) : (sign ? -value : value);
}

// The codes of a row, plane by plane; `to` has room for whole words of them.
static void add_plane(uint32_t* to, const uint32_t* words, int bits, int64_t columns, int place) {
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t start = 0, padded = up(columns, 32) * 32; start < padded; start += TILE) {
        const int64_t count = std::min(TILE, padded - start) * bits / 32;
        for (int field = 0; field < 32 / bits; field++)
            for (int64_t v = 0; v < count; v++)
                to[start + field * count + v] |= (words[v] >> (field * bits) & mask) << place;
        words += count;
    }
}

static void ternary_codes(uint32_t* to, const uint8_t* bytes, int64_t columns) {
    for (int64_t start = 0; start < columns; start += TERNARY_TILE) {
        const int64_t count = up(std::min(TERNARY_TILE, columns - start), 20) * 4;
        uint32_t power = 1;
        for (int digit = 0; digit < 5; digit++, power *= 3)
            for (int64_t v = 0; v < count; v++)
                to[start + digit * count + v] = (bytes[v] * power & 255) * 3 >> 8;
        bytes += count;
    }
}

// to[i] = table[codes[i]] * scale for codes below 16.
static void look_up(float* to, const uint32_t* codes, int64_t count, const float* table, float scale) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 levels = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(_mm512_loadu_si512(codes + i), levels));
#elif defined(__AVX2__)
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(table), factor);
    const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(table + 8), factor);
    for (; i + 8 <= count; i += 8) {
        const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        const __m256 one = _mm256_permutevar8x32_ps(low, code);
        const __m256 other = _mm256_permutevar8x32_ps(high, code);
        _mm256_storeu_ps(to + i, _mm256_blendv_ps(one, other, upper));
    }
#endif
    for (; i < count; i++) to[i] = table[codes[i]] * scale;
}

struct Rows {  // unpacks rows of chunks, one at a time
    const uint32_t* pages;
    const float* tables;  // [formats][LEVELS]
    std::vector<uint32_t> codes;
    std::vector<float> values;

    const float* read(const Chunk& c, int64_t row) {
        const uint32_t* words = pages + c.at;
        values.resize(c.columns);
        if (c.format >= FLOAT) return dense(c, words + row * dense_words(c));
        const int id = c.format % ZERO_POINTS;
        codes.assign(up(c.columns, TERNARY_TILE) * TERNARY_TILE + 32, 0);
        unpack(c, words, row, id);
        words += c.rows * row_words(c.columns, id);
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(words);
        const int64_t groups = groups_of(c), size = c.group < 0 ? c.columns : c.group;
        const uint8_t* zeros = reinterpret_cast<const uint8_t*>(words + up(c.rows * groups, 2));
        float table[LEVELS];
        std::copy_n(tables + id * LEVELS, LEVELS, table);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * size, count = std::min(size, c.columns - start);
            if (c.format > ZERO_POINTS) {
                const int zero = bits_at(zeros, (row * groups + g) * id, id);
                for (int code = 0; code < LEVELS; code++) table[code] = float(code - zero);
            }
            look_up(&values[start], &codes[start], count, table, half(scales[row * groups + g]));
        }
        return values.data();
    }

    void unpack(const Chunk& c, const uint32_t* words, int64_t row, int id) {
        const int64_t whole = row_words(c.columns, id);
        if (id == TERNARY)
            return ternary_codes(codes.data(), reinterpret_cast<const uint8_t*>(words + row * whole), c.columns);
        if (id != 3) return add_plane(codes.data(), words + row * whole, id, c.columns, 0);
        const int64_t low = row_words(c.columns, 2), high = row_words(c.columns, 1);
        add_plane(codes.data(), words + row * low, 2, c.columns, 0);
        add_plane(codes.data(), words + c.rows * low + row * high, 1, c.columns, 2);
    }

    static int bits_at(const uint8_t* bytes, int64_t bit, int count) {
        int value = 0;
        for (int i = 0; i < count; i++, bit++) value |= (bytes[bit / 8] >> bit % 8 & 1) << i;
        return value;
    }

    const float* dense(const Chunk& c, const uint32_t* words) {
        if (c.format == FLOAT) return reinterpret_cast<const float*>(words);
        const uint16_t* source = reinterpret_cast<const uint16_t*>(words);
        if (c.format == HALF)
            for (int64_t i = 0; i < c.columns; i++) values[i] = half(source[i]);
        else
            for (int64_t i = 0; i < c.columns; i++) values[i] = from_bits(uint32_t(source[i]) << 16);
        return values.data();
    }
};

// Summed in one order on every CPU: SUMS at a time.
static float dot(const float* a, const float* b, int64_t count) {
    constexpr int SUMS = 32, VECTORS = SUMS / LANES;
    Vector sums[VECTORS] = {};
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS)
        for (int v = 0; v < VECTORS; v++) {
            Vector left, right;
            std::memcpy(&left, a + i + v * LANES, sizeof left);
            std::memcpy(&right, b + i + v * LANES, sizeof right);
            sums[v] += left * right;
        }
    float each[SUMS], total = 0;
    std::memcpy(each, sums, sizeof each);
    for (int j = 0; j < SUMS / 2; j++) total += each[j] + each[j + SUMS / 2];
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

static void add_times(float* __restrict to, const float* __restrict from, float by, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += by * from[i];
}

struct Batch {
    const float *y, *x;
    float* sums;
    int64_t n, k;
    const Chunk* chunks;
    const int32_t* bounds;
    const float *scalings, *weights;
    int64_t places;
};

struct Task { int32_t slot; std::vector<int64_t> tokens; };

struct Adapter {  // the chunks of one slot
    const Chunk *begin, *end;
    int64_t rows(int role) const {
        int64_t count = 0;
        for (const Chunk* c = begin; c < end; c++)
            if (c->role == role) count = std::max<int64_t>(count, c->first + c->rows);
        return count;
    }
    template <class Body>  // body(row of the part, its values)
    void each(int role, Rows& rows, const Body& body) const {
        for (const Chunk* c = begin; c < end; c++)
            if (c->role == role)
                for (int64_t row = 0; row < c->rows; row++) body(c->first + row, rows.read(*c, row));
    }
};

using Hidden = std::vector<std::vector<float>>;

static Hidden hidden(const Batch& b, const Adapter& adapter, const Task& task, Rows& rows) {
    const int64_t rank = adapter.rows(A), inner = adapter.rows(CORE);
    Hidden v(task.tokens.size(), std::vector<float>(rank));
    adapter.each(A, rows, [&](int64_t i, const float* row) {
        for (size_t t = 0; t < v.size(); t++) v[t][i] = dot(row, b.x + task.tokens[t] * b.k, b.k);
    });
    adapter.each(DIAGONAL, rows, [&](int64_t, const float* row) {
        for (auto& one : v)
            for (int64_t i = 0; i < rank; i++) one[i] *= row[i];
    });
    if (!inner) return v;
    Hidden after(v.size(), std::vector<float>(inner));
    adapter.each(CORE, rows, [&](int64_t i, const float* row) {
        for (size_t t = 0; t < v.size(); t++) after[t][i] = dot(row, v[t].data(), rank);
    });
    return after;
}

static void run(const Batch& b, const Task& task, int64_t place, Rows& rows) {
    const Adapter adapter{b.chunks + b.bounds[task.slot], b.chunks + b.bounds[task.slot + 1]};
    const Hidden v = hidden(b, adapter, task, rows);
    const size_t count = task.tokens.size();
    std::vector<float> change(count * b.n);
    adapter.each(B, rows, [&](int64_t i, const float* row) {
        for (size_t t = 0; t < count; t++)
            add_times(&change[t * b.n], row, v[t][i] * b.scalings[task.slot], b.n);
    });
    adapter.each(OUT, rows, [&](int64_t, const float* row) {
        for (size_t t = 0; t < count; t++)
            for (int64_t i = 0; i < b.n; i++) change[t * b.n + i] *= row[i];
    });
    adapter.each(POST, rows, [&](int64_t, const float* row) {
        for (size_t t = 0; t < count; t++) {
            const float* y = b.y + task.tokens[t] * b.n;
            for (int64_t i = 0; i < b.n; i++)
                change[t * b.n + i] = row[i] * (y[i] + change[t * b.n + i]) - y[i];
        }
    });
    for (size_t t = 0; t < count; t++) {
        const int64_t token = task.tokens[t];
        add_times(b.sums + token * b.n, &change[t * b.n], b.weights[token * b.places + place], b.n);
    }
}

// Whether the parts of a slot fit the linear and each other: rows of each, and columns that are read.
static bool fits(const Adapter& adapter, int64_t n, int64_t k) {
    const int64_t rank = adapter.rows(A), core = adapter.rows(CORE), out = adapter.rows(B);
    const int64_t columns[ROLES] = {k, n, rank, rank, n, n};
    for (const Chunk* c = adapter.begin; c < adapter.end; c++) {
        if (c->columns < columns[c->role]) return false;
        if (c->role >= DIAGONAL && c->first + c->rows > 1) return false;
    }
    return out == (core ? core : rank);
}

// 0, or one more than the slot that is not sound; nothing is written then.
extern "C" int64_t lowra_apply_adapters(
    const float* y, const float* x, float* sums, int64_t m, int64_t n, int64_t k,
    const uint32_t* pages, int64_t words, const int32_t* chunks, int64_t chunk_count,
    const int32_t* bounds, const float* scalings, int64_t slot_count, const int32_t* slots,
    const float* weights, int64_t places, const float* tables, int threads) {
    const Batch batch{y, x, sums, n, k, reinterpret_cast<const Chunk*>(chunks), bounds, scalings,
                      weights, places};
    for (int64_t slot = 0; slot < slot_count; slot++) {
        const int64_t begin = bounds[slot], end = bounds[slot + 1];
        if (begin < 0 || end < begin || end > chunk_count) return slot + 1;
        for (int64_t i = begin; i < end; i++)
            if (!sound(batch.chunks[i], words)) return slot + 1;
        if (begin < end && !fits({batch.chunks + begin, batch.chunks + end}, n, k)) return slot + 1;
    }
    for (int64_t place = 0; place < places; place++) {
        std::vector<Task> tasks;
        std::vector<int64_t> open(slot_count, -1);  // the task of a slot that has room
        for (int64_t token = 0; token < m; token++) {
            const int32_t slot = slots[token * places + place];
            if (slot < 0 || slot >= slot_count || bounds[slot] == bounds[slot + 1]) continue;
            if (open[slot] < 0) {
                open[slot] = int64_t(tasks.size());
                tasks.push_back({slot, {}});
            }
            Task& task = tasks[open[slot]];
            task.tokens.push_back(token);
            if (task.tokens.size() == TOKENS) open[slot] = -1;
        }
        parallel_rows(int64_t(tasks.size()), 1, threads, [&](int64_t begin, int64_t end) {
            Rows rows{pages, tables, {}, {}};
            for (int64_t i = begin; i < end; i++) run(batch, tasks[i], place, rows);
        });
    }
    return 0;
}
