// What the gradient of a weight gives its tables: its sums by code.

// Vectors as gcc and clang know them on every machine; a plain loop of comparisons stays scalar.
using SixteenBytes = uint8_t __attribute__((vector_size(16)));
using SixteenWords = int32_t __attribute__((vector_size(64)));
using SixteenFloats = float __attribute__((vector_size(64)));

// Sums of grad by code: 16 lanes a level, added up in one order.
template <int LEVELS>
static void sums_by_code(const uint8_t* codes, const float* grad, int64_t count, float* sums) {
    SixteenFloats lanes[LEVELS] = {};
    for (int64_t i = 0; i < count; i += 16) {
        SixteenBytes bytes{};
        SixteenWords bits{};
        const size_t there = size_t(std::min<int64_t>(16, count - i));
        std::memcpy(&bytes, codes + i, there == 16 ? 16 : there);
        std::memcpy(&bits, grad + i, there == 16 ? 64 : 4 * there);
        const SixteenWords wide = __builtin_convertvector(bytes, SixteenWords);
        for (int level = 0; level < LEVELS; level++)
            lanes[level] += SixteenFloats((wide == level) & bits);
    }
    for (int level = 0; level < LEVELS; level++) {
        for (int half = 8; half; half /= 2)
            for (int j = 0; j < half; j++) lanes[level][j] += lanes[level][j + half];
        sums[level] = lanes[level][0];
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
