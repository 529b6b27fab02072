// lowra::dequantize in stored coordinates: packed rows -> values, rows put back in their order.
//
// Words are planar: field f of word v in a tile is column k0 + f * words + v, so every inner loop
// runs over neighbouring words and neighbouring columns (docs/storage-format.md).

constexpr int64_t TILE = 256, WORD = 32;

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
    const int planes[2] = {panel.width == 3 ? 2 : panel.width, panel.width == 3 ? 1 : 0};
    const int64_t levels = int64_t(1) << panel.width;
    parallel_rows(panel.rows, 16, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> codes(layout.padded);
        for (int64_t row = begin; row < end; row++) {
            std::fill(codes.begin(), codes.end(), 0);
            const uint32_t* plane = panel.words;
            for (int p = 0, shift = 0; p < 2 && planes[p]; shift += planes[p++]) {
                const int64_t words = layout.padded * planes[p] / WORD;
                unpack(plane + row * words, layout.padded, planes[p], shift, codes.data());
                plane += panel.rows * words;
            }
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

// panels: width and rows in turn. tables: of each panel in turn, one or one per row. scales
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
        codes += panel.rows * layout.padded / WORD * panel.width;
        tables += (shared ? 1 : panel.rows) << panel.width;
        if (scales) scales += panel.rows * groups;
        order += panel.rows;
    }
}
