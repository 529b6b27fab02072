// lowra::feedback_codes: error feedback (GPTQ), and lowra::descend_codes: coordinate descent, with a
// codebook per row.
//
// Rows do not depend on each other. A block of ROWS of them lies transposed, [k][ROWS], so that a
// vector holds one column of many rows; the k x k matrix streams past it. Inside a panel of PANEL
// columns changes spread at once, outside it as a small matrix product: HELD vectors of each of TILE
// columns stay in registers, of which AVX-512 has 32 and others 16.

constexpr int ROWS = 64, VECTORS = ROWS / LANES, PANEL = 32;
constexpr int HELD = 4, TILE = LANES == 16 ? 4 : 3;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
struct Column { Vector part[VECTORS]; };
struct Codes { Bytes part[VECTORS]; };

struct Block {  // everything of ROWS rows, transposed
    std::vector<Column> weight, thresholds, levels, scales;
    std::vector<Codes> codes;
    int64_t levels_used = 1;
};

static void load(std::vector<Column>& to, const float* from, int64_t rows, int64_t columns) {
    to.resize(columns);
    float* lane = reinterpret_cast<float*>(to.data());
    for (int64_t row = 0; row < ROWS; row++) {
        const float* source = from + std::min(row, rows - 1) * columns;
        for (int64_t c = 0; c < columns; c++) lane[c * ROWS + row] = source[c];
    }
}

static void load_tables(Block& block, const float* tables, int64_t rows, int64_t count) {
    load(block.levels, tables, rows, count);
    block.thresholds.resize(count);
    block.levels_used = 1;
    for (int64_t j = 0; j + 1 < count; j++) {
        bool finite = false;
        for (int v = 0; v < VECTORS; v++) {
            Vector above = block.levels[j + 1].part[v];
            block.thresholds[j].part[v] = (block.levels[j].part[v] + above) / 2;
            for (int i = 0; i < LANES; i++) finite |= above[i] < __builtin_inff();
        }
        if (!finite) break;
        block.levels_used = j + 2;
    }
}

// The nearest level to `wanted` (in units of the scale) in part v of a row block, and its code.
static Vector nearest(const Block& block, int v, Vector wanted, Integers& code) {
    Vector level = block.levels[0].part[v];
    code = Integers{};
    for (int64_t j = 0; j + 1 < block.levels_used; j++) {
        const Integers above = block.thresholds[j].part[v] < wanted;
        code -= above;
        level = above ? block.levels[j + 1].part[v] : level;
    }
    return level;
}

static void write_codes(const Block& block, uint8_t* codes, int64_t rows, int64_t k) {
    const uint8_t* lane = reinterpret_cast<const uint8_t*>(block.codes.data());
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < k; c++) codes[row * k + c] = lane[c * ROWS + row];
}

static void round_column(Block& block, int64_t column, const Column& scale, float inverse,
                         Column& error) {
    for (int v = 0; v < VECTORS; v++) {
        const Vector w = block.weight[column].part[v];
        Integers code;
        const Vector level = nearest(block, v, w / scale.part[v], code);
        error.part[v] = (w - level * scale.part[v]) * inverse;
        block.codes[column].part[v] = __builtin_convertvector(code, Bytes);
    }
}

struct Changes {  // columns that changed, by how much, and their rows of the matrix
    Column by[PANEL];
    const float* matrix[PANEL];
    int count = 0;
};

// to[j..j+COUNT) -= sum over the changes of matrix[j] * by
template <int COUNT>
static void spread(Column* to, int64_t j, const Changes& changes) {
    for (int first = 0; first < VECTORS; first += HELD) {
        Vector sum[COUNT][HELD];
        for (int c = 0; c < COUNT; c++)
            for (int v = 0; v < HELD; v++) sum[c][v] = to[j + c].part[first + v];
        for (int i = 0; i < changes.count; i++)
            for (int c = 0; c < COUNT; c++)
                for (int v = 0; v < HELD; v++)
                    sum[c][v] -= changes.by[i].part[first + v] * changes.matrix[i][j + c];
        for (int c = 0; c < COUNT; c++)
            for (int v = 0; v < HELD; v++) to[j + c].part[first + v] = sum[c][v];
    }
}

// The same for all columns in [begin, end).
static void spread_over(Column* to, int64_t begin, int64_t end, const Changes& changes) {
    int64_t j = begin;
    for (; j + TILE <= end; j += TILE) spread<TILE>(to, j, changes);
    for (; j < end; j++) spread<1>(to, j, changes);
}

static void feedback_block(Block& block, const float* upper, const int64_t* columns, int64_t k) {
    Changes errors;
    Column* weight = block.weight.data();
    for (int64_t start = 0; start < k; start += PANEL) {
        const int64_t end = std::min<int64_t>(k, start + PANEL);
        errors.count = 0;
        for (int64_t i = start; i < end; i++) {
            const float* row = errors.matrix[errors.count] = upper + i * k;
            Column& error = errors.by[errors.count++];
            round_column(block, i, block.scales[columns[i]], 1 / row[i], error);
            for (int64_t j = i + 1; j < end; j++)
                for (int v = 0; v < VECTORS; v++) weight[j].part[v] -= error.part[v] * row[j];
        }
        spread_over(weight, end, k, errors);
    }
}

// weight [n, k], upper [k, k], tables [n, count], scales [n, groups], columns [k] -> codes [n, k]
extern "C" void lowra_feedback_codes(const float* weight, const float* upper, const float* tables,
                                     const float* scales, const int64_t* columns, uint8_t* codes,
                                     int64_t n, int64_t k, int64_t count, int64_t groups,
                                     int threads) {
    parallel_rows(n, ROWS, threads, [&](int64_t begin, int64_t end) {
        Block block;
        load(block.weight, weight + begin * k, end - begin, k);
        load_tables(block, tables + begin * count, end - begin, count);
        load(block.scales, scales + begin * groups, end - begin, groups);
        block.codes.resize(k);
        feedback_block(block, upper, columns, k);
        write_codes(block, codes + begin * k, end - begin, k);
    });
}

// Codes of a row block, and the value that each stands for.
static void load_values(Block& block, const uint8_t* codes, const int64_t* columns, int64_t rows,
                        int64_t k, std::vector<Column>& values) {
    values.resize(k);
    block.codes.resize(k);
    for (int64_t c = 0; c < k; c++)
        for (int64_t lane = 0; lane < ROWS; lane++) {
            const int v = int(lane / LANES), i = int(lane % LANES);
            const uint8_t code = codes[std::min(lane, rows - 1) * k + c];
            block.codes[c].part[v][i] = code;
            values[c].part[v][i] = block.levels[code].part[v][i] * block.scales[columns[c]].part[v][i];
        }
}

// One column to its best level; whether that changed any row.
static bool step(const Block& block, float diagonal, const Column& scale, Column& value,
                 const Column& slope, Column& change, Codes& codes) {
    Integers moved = {};
    for (int v = 0; v < VECTORS; v++) {
        const Vector old = value.part[v], wanted = old + slope.part[v] / diagonal;
        Integers code;
        const Vector now = nearest(block, v, wanted / scale.part[v], code) * scale.part[v];
        moved |= now != old;
        change.part[v] = now - old;
        value.part[v] = now;
        codes.part[v] = __builtin_convertvector(code, Bytes);
    }
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= moved[lane];
    return any;
}

// One sweep: each column in turn to the level that is best given all others. `slope` is the error
// times the Gram matrix, kept up to date. Returns whether anything changed.
static bool sweep(Block& block, const float* gram, const int64_t* columns,
                  std::vector<Column>& values, std::vector<Column>& slope, int64_t k) {
    Changes changes;
    bool any = false;
    for (int64_t start = 0; start < k; start += PANEL) {
        const int64_t end = std::min<int64_t>(k, start + PANEL);
        changes.count = 0;
        for (int64_t i = start; i < end; i++) {
            const float* row = changes.matrix[changes.count] = gram + i * k;
            Column& change = changes.by[changes.count];
            if (!step(block, row[i], block.scales[columns[i]], values[i], slope[i], change,
                      block.codes[i]))
                continue;
            changes.count++;
            for (int64_t j = start; j < end; j++)
                for (int v = 0; v < VECTORS; v++) slope[j].part[v] -= change.part[v] * row[j];
        }
        if (!changes.count) continue;
        any = true;
        spread_over(slope.data(), 0, start, changes);
        spread_over(slope.data(), end, k, changes);
    }
    return any;
}

// The slope of a row block, error times Gram matrix, from nothing.
static void find_slope(Block& block, const float* gram, const std::vector<Column>& values,
                       std::vector<Column>& slope, int64_t k) {
    for (int64_t c = 0; c < k; c++)  // minus the error: spread() subtracts
        for (int v = 0; v < VECTORS; v++)
            block.weight[c].part[v] = values[c].part[v] - block.weight[c].part[v];
    slope.assign(k, Column{});
    for (int64_t start = 0; start < k; start += PANEL) {
        Changes errors;
        for (int64_t i = start; i < std::min<int64_t>(k, start + PANEL); i++) {
            errors.matrix[errors.count] = gram + i * k;
            errors.by[errors.count++] = block.weight[i];
        }
        spread_over(slope.data(), 0, k, errors);
    }
}

// weight [n, k], gram [k, k] with a positive diagonal, codes [n, k] in and out, slopes [n, k] in
// where `known`, and out; the rest as above.
extern "C" void lowra_descend_codes(const float* weight, const float* gram, const float* tables,
                                    const float* scales, const int64_t* columns, uint8_t* codes,
                                    int64_t n, int64_t k, int64_t count, int64_t groups,
                                    float* slopes, int64_t known, int64_t sweeps, int threads) {
    parallel_rows(n, ROWS, threads, [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin;
        Block block;
        std::vector<Column> values, slope;
        load_tables(block, tables + begin * count, rows, count);
        load(block.scales, scales + begin * groups, rows, groups);
        load_values(block, codes + begin * k, columns, rows, k, values);
        if (known) {
            load(slope, slopes + begin * k, rows, k);
        } else {
            load(block.weight, weight + begin * k, rows, k);
            find_slope(block, gram, values, slope, k);
        }
        for (int64_t s = 0; s < sweeps; s++)
            if (!sweep(block, gram, columns, values, slope, k)) break;
        write_codes(block, codes + begin * k, rows, k);
        const float* lane = reinterpret_cast<const float*>(slope.data());
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = 0; c < k; c++) slopes[(begin + row) * k + c] = lane[c * ROWS + row];
    });
}
