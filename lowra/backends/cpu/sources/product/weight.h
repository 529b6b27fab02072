// A packed weight and one call on it, as Python hands them over (lowra/backends/cpu/product.py).

constexpr int64_t TILE = 256, TERNARY_TILE = 320, WORD = 32, MOST_PANELS = 8;
constexpr int TERNARY = 9;  // the id of rows of three levels
constexpr int TRELLIS = 10;  // ids above it: trellis codes of id - 10 stored bits

struct Weight {
    const uint32_t* codes;
    const uint16_t *codebooks, *scales;  // float16; scales may be null
    const int32_t* order;                // original index of each stored row
    const float* signs;                  // k signs over sqrt(block), or null
    uint8_t* derived;                    // see tables.h
    int64_t n, k, group, groups, block, panels;
    int64_t widths[MOST_PANELS], rows[MOST_PANELS];
    int32_t shared, ready;
};

struct Extras {  // what a product adds to x W'; the same from call to call
    const void *bias, *a, *b;
    int64_t rank;
    float scaling;
    Kind bias_kind, factor_kind;
};

struct Call {
    const void* x;
    void* y;
    int64_t m, x_stride;
    Kind kind;
    int threads;
    Extras more;
};

struct Part {  // of a weight's values
    void* out;
    int64_t first_row, last_row, first_column, last_column;
    Kind kind;
};

struct Panel {
    int width;
    int64_t first, rows;        // first: stored row
    const uint32_t* words;
    const uint16_t *codebook, *scales;
    const uint8_t* tables;      // looked-up elements, table after table
    const float* affine;        // step and offset of each table
};

static inline int64_t padded(int64_t k) { return (k + WORD - 1) / WORD * WORD; }
static inline int64_t stored_bits(int64_t width) {
    return width > TRELLIS ? width - TRELLIS : width;
}
static inline int64_t first_plane(int64_t width) {  // bits of it; the rest are a plane of their own
    return stored_bits(width) == 3 ? 2 : stored_bits(width);
}
static inline int64_t row_words(int64_t k, int64_t width) {  // or bits of a plane
    return width == TERNARY ? (k + 19) / 20 : padded(k) * stored_bits(width) / WORD;
}
static inline int levels_of(int64_t width) {
    return width == TERNARY ? 3 : width > TRELLIS ? 2 << (width - TRELLIS) : 1 << width;
}
static inline int64_t table_bytes(int64_t width) {  // of looked-up elements; a place per power of 2
    return width == TERNARY ? 4 * ELEMENT : levels_of(width) <= 16 ? ELEMENT * levels_of(width) : 0;
}

// Where a table has a level. Trellis rows that store more than one bit are looked up with the lowest
// bit of a level's number above the next two: so trellis_lanes.h has them.
static inline int table_place(int64_t width, int level) {
    return width > TRELLIS + 1 ? (level & 8) | (level >> 1 & 3) | (level & 1) << 2 : level;
}

static int64_t tables_of(const Weight& w, int64_t panel) { return w.shared ? 1 : w.rows[panel]; }

struct Panels {
    Panel list[MOST_PANELS];
    int64_t count;
    const Panel* begin() const { return list; }
    const Panel* end() const { return list + count; }
};

static Panels panels_of(const Weight& w) {
    int64_t count = 0;
    for (int64_t p = 0; p < w.panels; p++) count += tables_of(w, p);
    const float* affine = reinterpret_cast<const float*>(w.derived);
    const uint8_t* tables = w.derived + count * 8;
    Panels panels{{}, w.panels};
    Panel next{0, 0, 0, w.codes, w.codebooks, w.scales, tables, affine};
    for (int64_t p = 0; p < w.panels; p++) {
        next.width = int(w.widths[p]);
        next.rows = w.rows[p];
        panels.list[p] = next;
        next.first += next.rows;
        next.words += next.rows * row_words(w.k, next.width);
        next.codebook += tables_of(w, p) * levels_of(next.width);
        if (w.scales) next.scales += next.rows * w.groups;
        next.tables += tables_of(w, p) * table_bytes(next.width);
        next.affine += 2 * tables_of(w, p);
    }
    return panels;
}

static bool has_width(const Weight& w, int64_t width) {
    for (int64_t p = 0; p < w.panels; p++)
        if (w.widths[p] == width) return true;
    return false;
}
