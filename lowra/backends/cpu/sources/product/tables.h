// Codebooks as the dot products look them up; kept in `derived` beside the codebooks they come
// from, and made anew when those change (training does that).

struct Steps {
    float step, offset;
};

// value ~ offset + step * u with u in 0..MOST: end values are exact, and of all grids those from
// MOST / 2 to MOST steps are tried, for the one that the values between lie nearest to.
static Steps fit_steps(const float* values, int count, int most, uint8_t* u) {
    const float low = *std::min_element(values, values + count);
    const float span = *std::max_element(values, values + count) - low;
    if (!(span > 0)) {
        std::memset(u, 0, size_t(count));
        return {0, low};
    }
    int best = most;
    float least = 1e30f;
    for (int steps = most; steps > most / 2; steps--) {
        float error = 0;
        for (int i = 0; i < count; i++) {
            const float at = (values[i] - low) / span * float(steps);
            const float off = (at - float(int(at + 0.5f))) / float(steps);
            error += off * off;
        }
        if (error < least) least = error, best = steps;
    }
    for (int i = 0; i < count; i++)
        u[i] = uint8_t(int((values[i] - low) / span * float(best) + 0.5f));
    return {span / float(best), low};
}

static Steps fill_table(const float* values, int count, uint8_t* out) {
    if (ELEMENT == 1) return fit_steps(values, count, MOST, out);
    for (int i = 0; i < count; i++) {
        if (ELEMENT == 4) std::memcpy(out + 4 * i, values + i, 4);
        const uint16_t half = to_bfloat16(values[i]);
        if (ELEMENT == 2) std::memcpy(out + 2 * i, &half, 2);
    }
    return {1, 0};
}

// Where the tables in `derived` are not those of the codebooks: writes them.
static void derive(Weight& w) {
    int64_t count = 0, values = 0, bytes = 0;
    for (int64_t p = 0; p < w.panels; p++) {
        count += tables_of(w, p);
        values += tables_of(w, p) * levels_of(w.widths[p]);
        bytes += tables_of(w, p) * table_bytes(w.widths[p]);
    }
    uint8_t* copy = w.derived + 8 * count + bytes;
    if (w.ready && !std::memcmp(copy, w.codebooks, size_t(2 * values))) return;
    float* affine = reinterpret_cast<float*>(w.derived);
    uint8_t* table = w.derived + 8 * count;
    const uint16_t* codebook = w.codebooks;
    for (int64_t p = 0; p < w.panels; p++)
        for (int64_t t = 0; t < tables_of(w, p); t++, affine += 2) {
            const int levels = levels_of(w.widths[p]);
            if (levels <= 16) {
                float floats[16];
                for (int i = 0; i < levels; i++)
                    floats[table_place(w.widths[p], i)] = from_float16(codebook[i]);
                const Steps steps = fill_table(floats, levels, table);
                affine[0] = steps.step;
                affine[1] = steps.offset;
                table += table_bytes(w.widths[p]);
            }
            codebook += levels;
        }
    std::memcpy(copy, w.codebooks, size_t(2 * values));
    w.ready = 1;
}
