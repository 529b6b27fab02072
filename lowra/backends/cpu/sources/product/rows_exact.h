// Rows in float32, whatever their width and scales: what other rows do not cover, and what a token
// needs that no integers can hold.

// Adds the fields of one plane, `bits` wide, to the codes of a row at bit `shift`.
static void unpack(const uint32_t* __restrict words, int64_t columns, int bits, int shift,
                   uint8_t* __restrict codes) {
    for (int64_t k0 = 0; k0 < columns; k0 += TILE) {
        const int64_t count = std::min(TILE, columns - k0) * bits / WORD;
        const uint32_t mask = (1u << bits) - 1;
        for (int field = 0; field < WORD / bits; field++) {
            uint8_t* __restrict to = codes + k0 + field * count;
            for (int64_t v = 0; v < count; v++)
                to[v] |= uint8_t(((words[v] >> (field * bits)) & mask) << shift);
        }
        words += count;
    }
}

// Digit f of byte v in a ternary tile of `count` bytes is column k0 + f * count + v. Times 3^f mod
// 256, a byte is the rest of a fraction that the digit leads.
static void unpack_ternary(const uint8_t* bytes, int64_t k, uint8_t* codes) {
    for (int64_t k0 = 0; k0 < k; k0 += TERNARY_TILE) {
        const int64_t columns = std::min(TERNARY_TILE, k - k0), count = (columns + 19) / 20 * 4;
        uint8_t power = 1;
        for (int64_t first = 0; first < columns; first += count, power = uint8_t(power * 3)) {
            uint8_t* to = codes + k0 + first;
            for (int64_t v = 0; v < std::min(count, columns - first); v++)
                to[v] = uint8_t(uint8_t(bytes[v] * power) * 3 >> 8);
        }
        bytes += count;
    }
}

// From the stored bits of a trellis row to its codes.
static void number_levels(const Panel& panel, int64_t row, int64_t k, uint8_t* __restrict codes) {
    const int64_t bits = first_plane(panel.width);
    const Before before = rows_before(panel, row, k);
    const uint32_t* own = panel.words + row * row_words(k, bits);
    const uint32_t *one = moved(own, before.one), *two = moved(own, before.two);
    const uint32_t *four = moved(own, before.four), *six = moved(own, before.six);
    for (int64_t k0 = 0, at = 0; k0 < padded(k); k0 += TILE) {
        const int64_t count = std::min(TILE, padded(k) - k0) * bits / WORD;
        for (int64_t field = 0; field < WORD / bits; field++) {
            uint8_t* __restrict to = codes + k0 + field * count;
            for (int64_t v = 0; v < count; v++) {
                const uint32_t low = two[at + v] ^ four[at + v];
                const uint32_t high = own[at + v] ^ one[at + v] ^ six[at + v];
                const int64_t by = field * bits;
                to[v] = uint8_t(to[v] >> 1 << 2 | (high >> by & 1) << 1 | (low >> by & 1));
            }
        }
        at += count;
    }
}

// Codes of stored row `row` of a panel; `codes` has room for padded(k).
static void unpack_row(const Panel& panel, int64_t row, int64_t k, uint8_t* codes) {
    const int first = int(first_plane(panel.width));
    const int planes[2] = {first, int(stored_bits(panel.width)) - first};
    const uint32_t* plane = panel.words;
    if (panel.width == TERNARY) {
        const uint32_t* words = plane + row * row_words(k, TERNARY);
        return unpack_ternary(reinterpret_cast<const uint8_t*>(words), k, codes);
    }
    std::memset(codes, 0, size_t(padded(k)));
    for (int p = 0, shift = 0; p < 2 && planes[p]; shift += planes[p++]) {
        const int64_t words = row_words(k, planes[p]);
        unpack(plane + row * words, padded(k), planes[p], shift, codes);
        plane += panel.rows * words;
    }
    if (panel.width > TRELLIS) number_levels(panel, row, k, codes);
}

// Values of a stored row in float32.
static void row_values(const Weight& w, const Panel& panel, int64_t row, uint8_t* codes,
                       float* out) {
    unpack_row(panel, row, w.k, codes);
    const int levels = levels_of(panel.width);
    const uint16_t* codebook = panel.codebook + (w.shared ? 0 : row * levels);
    const int64_t groups = std::max<int64_t>(w.groups, 1), size = w.group > 0 ? w.group : w.k;
    float table[256], values[256];
    for (int i = 0; i < levels; i++) table[i] = from_float16(codebook[i]);
    for (int64_t g = 0; g < groups; g++) {
        const float scale = w.scales ? from_float16(panel.scales[row * groups + g]) : 1.0f;
        for (int i = 0; i < levels; i++) values[i] = table[i] * scale;
        for (int64_t c = g * size; c < std::min(w.k, (g + 1) * size); c++) out[c] = values[codes[c]];
    }
}

static float dot_floats(const float* a, const float* b, int64_t count) {
    float lanes[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += a[i + j] * b[i + j];
    for (int j = 0; i + j < count; j++) lanes[j] += a[i + j] * b[i + j];
    for (int half = 8; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
    return lanes[0];
}
