// lowra::dequantize in stored coordinates: packed rows -> values, rows put back in their order.
//
// Words are planar: field f of word v in a tile is column k0 + f * words + v, so every inner loop
// runs over neighbouring words and neighbouring columns (docs/storage-format.md).

constexpr int64_t TILE = 256, WORD = 32, TERNARY_TILE = 320;
constexpr int TERNARY = 9;  // the width id of rows of three levels

static int64_t levels_of(int width) { return width == TERNARY ? 3 : int64_t(1) << width; }

static int64_t row_words(int width, int64_t k) {
    return width == TERNARY ? (k + 19) / 20 : (k + WORD - 1) / WORD * width;
}

struct Layout {
    int64_t k, padded, group, groups;  // group: columns per scale, 0 for one per row
    bool scaled, shared, bfloat16;
};

// Adds the fields of one plane, `bits` wide, to the codes of a row at bit `shift`.
static void unpack(const uint32_t* words, int64_t padded, int bits, int shift, uint8_t* codes) {
    for (int64_t k0 = 0; k0 < padded; k0 += TILE) {
        const int64_t count = std::min(TILE, padded - k0) * bits / WORD;
        const uint32_t mask = (1u << bits) - 1;
        for (int field = 0; field < WORD / bits; field++) {
            uint8_t* to = codes + k0 + field * count;
            for (int64_t v = 0; v < count; v++)
                to[v] |= uint8_t(((words[v] >> (field * bits)) & mask) << shift);
        }
        words += count;
    }
}

// The codes of a ternary row [k]: digit f of byte v in a tile of `count` bytes is column
// k0 + f * count + v. Times 3^f mod 256, a byte is the rest of a fraction that the digit leads.
static void unpack_ternary(const uint8_t* bytes, int64_t k, uint8_t* codes) {
    for (int64_t k0 = 0; k0 < k; k0 += TERNARY_TILE) {
        const int64_t columns = std::min(TERNARY_TILE, k - k0), count = (columns + 19) / 20 * 4;
        uint8_t power = 1;
        for (int64_t first = 0; first < columns; first += count, power *= 3) {
            uint8_t* to = codes + k0 + first;
            for (int64_t v = 0; v < std::min(count, columns - first); v++)
                to[v] = uint8_t(uint8_t(bytes[v] * power) * 3 >> 8);
        }
        bytes += count;
    }
}

// The codes of one row of a panel of `rows` rows that starts at `words`.
static void unpack_row(const uint32_t* words, int width, int64_t rows, int64_t row, int64_t k,
                       std::vector<uint8_t>& codes) {
    if (width == TERNARY)
        return unpack_ternary((const uint8_t*)(words + row * row_words(width, k)), k, codes.data());
    const int planes[2] = {width == 3 ? 2 : width, width == 3 ? 1 : 0};
    std::fill(codes.begin(), codes.end(), 0);
    for (int p = 0, shift = 0; p < 2 && planes[p]; shift += planes[p++]) {
        const int64_t count = row_words(planes[p], k);
        unpack(words + row * count, int64_t(codes.size()), planes[p], shift, codes.data());
        words += rows * count;
    }
}

static uint16_t to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class Value>
static void look_up(const uint8_t* codes, const float* table, int64_t levels, const float* scales,
                    const Layout& layout, Value* out) {
    for (int64_t g = 0; g < layout.groups; g++) {
        Value scaled[256];
        for (int64_t j = 0; j < levels; j++) {
            const float value = layout.scaled ? table[j] * scales[g] : table[j];
            if constexpr (sizeof(Value) == 2) scaled[j] = to_bfloat16(value);
            else scaled[j] = value;
        }
        const int64_t size = layout.group ? layout.group : layout.k;
        for (int64_t c = g * size; c < std::min(layout.k, (g + 1) * size); c++)
            out[c] = scaled[codes[c]];
    }
}

struct Panel {
    int width;
    int64_t rows;
    const uint32_t* words;
    const float *tables, *scales;
    const int32_t* order;
};

static void write_rows(const Panel& panel, const Layout& layout, void* out, int threads) {
    const int64_t levels = levels_of(panel.width);
    parallel_rows(panel.rows, 16, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(layout.padded);
        for (int64_t row = begin; row < end; row++) {
            unpack_row(panel.words, panel.width, panel.rows, row, layout.k, codes);
            const float* table = panel.tables + (layout.shared ? 0 : row * levels);
            const float* scales = panel.scales + (layout.scaled ? row * layout.groups : 0);
            const int64_t to = panel.order[row] * layout.k;
            if (layout.bfloat16)
                look_up(codes.data(), table, levels, scales, layout, (uint16_t*)out + to);
            else
                look_up(codes.data(), table, levels, scales, layout, (float*)out + to);
        }
    });
}

// panels: width id (9 is ternary) and rows in turn. tables: of each panel in turn, one or one per row. scales
// [n, groups] or null. order [n]: the original index of each stored row. out [n, k].
extern "C" void lowra_dequantize(const uint32_t* codes, const float* tables, const float* scales,
                                 const int32_t* order, const int64_t* panels, int64_t count,
                                 int64_t k, int64_t group, int64_t groups, int shared,
                                 int bfloat16, void* out, int threads) {
    const Layout layout{k, (k + WORD - 1) / WORD * WORD, group, groups,
                        scales != nullptr, shared != 0, bfloat16 != 0};
    for (int64_t p = 0; p < count; p++) {
        const Panel panel{int(panels[2 * p]), panels[2 * p + 1], codes, tables, scales, order};
        write_rows(panel, layout, out, threads);
        codes += panel.rows * row_words(panel.width, k);
        tables += (shared ? 1 : panel.rows) * levels_of(panel.width);
        if (scales) scales += panel.rows * groups;
        order += panel.rows;
    }
}
