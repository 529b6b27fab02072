// What the gradient of a weight gives its tables: its sums by code.

// Vectors as gcc and clang know them on every machine; a plain loop of comparisons stays scalar.
using LaneBytes = uint8_t __attribute__((vector_size(LANES)));
using LaneWords = int32_t __attribute__((vector_size(4 * LANES)));
using LaneFloats = float __attribute__((vector_size(4 * LANES)));

constexpr int SUMS = 16;  // a level has, added up in one order on every CPU

template <int LEVELS>
static void add_by_code(const uint8_t* codes, const float* grad,
                        LaneFloats (&sums)[LEVELS][SUMS / LANES]) {
    for (int v = 0; v < SUMS / LANES; v++) {
        LaneBytes bytes;
        LaneWords bits;
        std::memcpy(&bytes, codes + v * LANES, sizeof bytes);
        std::memcpy(&bits, grad + v * LANES, sizeof bits);
        const LaneWords wide = __builtin_convertvector(bytes, LaneWords);
        for (int level = 0; level < LEVELS; level++)
            sums[level][v] += LaneFloats((wide == level) & bits);
    }
}

// Sums of grad by code.
template <int LEVELS>
static void sums_by_code(const uint8_t* codes, const float* grad, int64_t count, float* sums) {
    LaneFloats lanes[LEVELS][SUMS / LANES] = {};
    int64_t i = 0;
    for (; i + SUMS <= count; i += SUMS) add_by_code(codes + i, grad + i, lanes);
    if (i < count) {
        uint8_t rest[SUMS] = {};
        float values[SUMS] = {};
        std::memcpy(rest, codes + i, size_t(count - i));
        std::memcpy(values, grad + i, size_t(count - i) * sizeof(float));
        add_by_code(rest, values, lanes);
    }
    for (int level = 0; level < LEVELS; level++) {
        float each[SUMS];
        std::memcpy(each, lanes[level], sizeof each);
        for (int half = SUMS / 2; half; half /= 2)
            for (int j = 0; j < half; j++) each[j] += each[j + half];
        sums[level] = each[0];
    }
}
static void sums_by_byte(const uint8_t* codes, const float* grad, int64_t count, float* sums) {
    std::memset(sums, 0, 256 * sizeof(float));
    for (int64_t i = 0; i < count; i++) sums[codes[i]] += grad[i];
}

// From dL/dW of part of the rows, all columns in stored coordinates, to `sums` of these rows:
// panel after panel [rows, groups, levels].
extern "C" void lowra_code_sums(const Weight* weight, const Part* given, float* sums, int threads) {
    const Weight& w = *weight;
    const Part& part = *given;
    const Panels panels = panels_of(w);
    const int64_t groups = std::max<int64_t>(w.groups, 1), size = w.group > 0 ? w.group : w.k;
    for (const Panel& panel : panels) {
        const int levels = levels_of(panel.width);
        parallel_rows(panel.rows, 16, threads, [&](int64_t begin, int64_t end) {
            std::vector<uint8_t> codes(size_t(padded(w.k)));
            std::vector<float> grad(size_t(w.k));
            for (int64_t row = begin; row < end; row++) {
                const int64_t original = w.order[panel.first + row];
                if (original < part.first_row || original >= part.last_row) continue;
                unpack_row(panel, row, w.k, codes.data());
                read_row(part.out, (original - part.first_row) * w.k, part.kind, w.k, grad.data());
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t at = g * size, count = std::min(size, w.k - at);
                    float* out = sums + (row * groups + g) * levels;
                    switch (levels) {
                        case 2: sums_by_code<2>(&codes[at], &grad[at], count, out); break;
                        case 3: sums_by_code<3>(&codes[at], &grad[at], count, out); break;
                        case 4: sums_by_code<4>(&codes[at], &grad[at], count, out); break;
                        case 8: sums_by_code<8>(&codes[at], &grad[at], count, out); break;
                        case 16: sums_by_code<16>(&codes[at], &grad[at], count, out); break;
                        default: sums_by_byte(&codes[at], &grad[at], count, out);
                    }
                }
            }
        });
        sums += panel.rows * groups * levels;
    }
}
