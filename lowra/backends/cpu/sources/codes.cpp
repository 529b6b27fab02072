// lowra::feedback_codes: error feedback (GPTQ), and lowra::descend_codes: coordinate descent, with a
// codebook per row.
//
// Rows do not depend on each other, but for those of a run of trellis codes, which are a block. A
// block of ROWS of them lies transposed, [k][ROWS], so that a vector holds one column of many rows;
// the k x k matrix streams past it. Inside a panel of PANEL columns changes spread at once, outside
// it as a small matrix product: HELD vectors of each of TILE columns stay in registers, of which
// AVX-512 has 32 and others 16.

// The value that a column of `wanted` is rounded to, and its codes.
static void round_to(const Block& block, const Column& wanted, const Column& scale, Column& value,
                     Codes& codes) {
    if (block.run) return best_path(block, wanted, scale, value, codes);
    for (int v = 0; v < VECTORS; v++) {
        Integers code;
        value.part[v] = nearest(block, v, wanted.part[v] / scale.part[v], code) * scale.part[v];
        codes.part[v] = __builtin_convertvector(code, Bytes);
    }
}

static void round_column(Block& block, int64_t column, const Column& scale, float inverse,
                         Column& error) {
    Column value;
    const Column& wanted = block.weight[column];
    round_to(block, wanted, scale, value, block.codes[column]);
    for (int v = 0; v < VECTORS; v++)
        error.part[v] = (wanted.part[v] - value.part[v]) * inverse;
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

// Every column by itself.
static void round_block(Block& block, const int64_t* columns, int64_t k) {
    Column value;
    for (int64_t i = 0; i < k; i++)
        round_to(block, block.weight[i], block.scales[columns[i]], value, block.codes[i]);
}

struct Blocks {  // row `starts[b]` begins block b, a run of trellis codes where `runs[b]`
    const int64_t *starts, *runs;
    int64_t count;
};

template <class Body>  // body(block without its tables, first row)
static void each_block(const Blocks& blocks, int threads, const Body& body) {
    parallel_rows(blocks.count, 1, threads, [&](int64_t b, int64_t) {
        Block block;
        block.rows = blocks.starts[b + 1] - blocks.starts[b];
        block.run = blocks.runs[b];
        body(block, blocks.starts[b]);
    });
}

// weight [n, k], upper [k, k] or null, tables [n, count], scales [n, groups], columns [k] -> codes
// [n, k]
extern "C" void lowra_feedback_codes(const float* weight, const float* upper, const float* tables,
                                     const float* scales, const int64_t* columns, uint8_t* codes,
                                     int64_t blocks, int64_t k, int64_t count,
                                     int64_t groups, const int64_t* starts, const int64_t* runs,
                                     int threads) {
    each_block({starts, runs, blocks}, threads, [&](Block& block, int64_t begin) {
        load(block.weight, weight + begin * k, block.rows, k);
        load_tables(block, tables + begin * count, block.rows, count);
        load(block.scales, scales + begin * groups, block.rows, groups);
        block.codes.resize(k);
        if (upper) feedback_block(block, upper, columns, k);
        else round_block(block, columns, k);
        write_codes(block, codes + begin * k, block.rows, k);
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
    Column wanted, now;
    Integers moved = {};
    for (int v = 0; v < VECTORS; v++) wanted.part[v] = value.part[v] + slope.part[v] / diagonal;
    round_to(block, wanted, scale, now, codes);
    for (int v = 0; v < VECTORS; v++) {
        moved |= now.part[v] != value.part[v];
        change.part[v] = now.part[v] - value.part[v];
    }
    value = now;
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
                                    int64_t blocks, int64_t k, int64_t count, int64_t groups,
                                    const int64_t* starts, const int64_t* runs, float* slopes,
                                    int64_t known, int64_t sweeps, int threads) {
    each_block({starts, runs, blocks}, threads, [&](Block& block, int64_t begin) {
        const int64_t rows = block.rows;
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
