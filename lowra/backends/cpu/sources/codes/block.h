// A block of rows, transposed, and the nearest level of each.

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
    int64_t rows = ROWS;      // the rest repeat the last
    bool run = false;         // of trellis codes: see paths.h
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
