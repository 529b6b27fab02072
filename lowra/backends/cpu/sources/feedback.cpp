// lowra::feedback_codes: error feedback (GPTQ), a codebook per row.
//
// Rows do not depend on each other. A block of ROWS of them lies transposed, [k][ROWS], so that a
// vector holds one column of many rows; U streams past it once. Inside a panel of PANEL columns
// errors spread at once, behind it as a small matrix product held in registers.

constexpr int LANES = 16, VECTORS = 4, ROWS = LANES * VECTORS, PANEL = 32, TILE = 4;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
struct Column { Vector part[VECTORS]; };

struct Block {  // everything of ROWS rows, transposed
    std::vector<Column> weight, thresholds, levels, scales;
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

// The nearest level of each lane; codes of this column go to `codes` with stride k.
static void round_column(Block& block, int64_t column, const Column& scale, float inverse,
                         Column& error, uint8_t* codes, int64_t stride, int64_t rows) {
    for (int v = 0; v < VECTORS; v++) {
        const Vector w = block.weight[column].part[v], normal = w / scale.part[v];
        Vector level = block.levels[0].part[v];
        Integers code = {};
        for (int64_t j = 0; j + 1 < block.levels_used; j++) {
            const Integers above = block.thresholds[j].part[v] < normal;
            code -= above;
            level = above ? block.levels[j + 1].part[v] : level;
        }
        error.part[v] = (w - level * scale.part[v]) * inverse;
        for (int64_t i = 0; i < LANES && v * LANES + i < rows; i++)
            codes[(v * LANES + i) * stride] = static_cast<uint8_t>(code[i]);
    }
}

// weight[j..j+COUNT) -= sum over the panel's columns i of U[i][j] * error[i]
template <int COUNT>
static void spread(Column* weight, const float* upper, int64_t k, const Column* errors, int panel) {
    Column sum[COUNT];
    for (int j = 0; j < COUNT; j++) sum[j] = weight[j];
    for (int i = 0; i < panel; i++)
        for (int j = 0; j < COUNT; j++)
            for (int v = 0; v < VECTORS; v++) sum[j].part[v] -= errors[i].part[v] * upper[i * k + j];
    for (int j = 0; j < COUNT; j++) weight[j] = sum[j];
}

static void feedback_block(Block& block, const float* upper, const int64_t* columns, uint8_t* codes,
                           int64_t rows, int64_t k) {
    Column errors[PANEL];
    Column* weight = block.weight.data();
    for (int64_t start = 0; start < k; start += PANEL) {
        const int64_t end = std::min<int64_t>(k, start + PANEL);
        for (int64_t i = start; i < end; i++) {
            Column& error = errors[i - start];
            const float* row = upper + i * k;
            round_column(block, i, block.scales[columns[i]], 1 / row[i], error, codes + i, k, rows);
            for (int64_t j = i + 1; j < end; j++)
                for (int v = 0; v < VECTORS; v++) weight[j].part[v] -= error.part[v] * row[j];
        }
        int64_t j = end;
        const float* panel = upper + start * k;
        for (; j + TILE <= k; j += TILE) spread<TILE>(weight + j, panel + j, k, errors, end - start);
        for (; j < k; j++) spread<1>(weight + j, panel + j, k, errors, end - start);
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
        feedback_block(block, upper, columns, codes + begin * k, end - begin, k);
    });
}
