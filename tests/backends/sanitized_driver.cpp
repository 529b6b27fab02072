// Runs the kernel in KERNEL on one case, every array in a block of its own size, so that a
// sanitizer sees any access past it. Reads the case from the file argv[1], writes results to argv[2].
// Arrays in both: 64-bit length in bytes, then the bytes. See test_cpu_sanitizers.py.
#include KERNEL

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdio>
#include <cstdlib>
#include <memory>

struct Array {
    int64_t bytes = 0;
    std::unique_ptr<char[]> data;
    explicit Array(int64_t size) : bytes(size), data(size ? new char[size_t(size)]() : nullptr) {}
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data.get());
    }
};

static Array read_array(FILE* file) {
    int64_t bytes = 0;
    if (std::fread(&bytes, 8, 1, file) != 1) std::exit(2);
    Array array(bytes);
    if (bytes && std::fread(array.data.get(), 1, size_t(bytes), file) != size_t(bytes)) std::exit(2);
    return array;
}

static void write_array(FILE* file, const Array& array) {
    std::fwrite(&array.bytes, 8, 1, file);
    if (array.bytes) std::fwrite(array.data.get(), 1, size_t(array.bytes), file);
}

// numbers: n, k, group, groups, block, shared, m, rank, kind, bytes of `derived`, then the panels'
// width and rows in turn.
int main(int, char** argv) {
#ifdef __AMX_TILE__
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 3;  // as tiers.py asks for the tiles
#endif
    FILE* in = std::fopen(argv[1], "rb");
    FILE* out = std::fopen(argv[2], "wb");
    if (!in || !out) return 2;
    const Array codes = read_array(in), codebooks = read_array(in), scales = read_array(in);
    const Array order = read_array(in), signs = read_array(in), numbers = read_array(in);
    const Array x = read_array(in), bias = read_array(in), a = read_array(in), b = read_array(in);
    const int64_t* number = numbers.as<int64_t>();
    const int64_t n = number[0], k = number[1], m = number[6], rank = number[7];
    const Kind kind = Kind(number[8]);
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    const Array derived(number[9]), y(m * n * size), values(n * k * size), turned(m * k * size);

    Weight w{};
    w.codes = codes.as<uint32_t>();
    w.codebooks = codebooks.as<uint16_t>();
    w.scales = scales.as<uint16_t>();
    w.order = order.as<int32_t>();
    w.signs = signs.as<float>();
    w.derived = derived.as<uint8_t>();
    w.n = n, w.k = k, w.group = number[2], w.groups = number[3], w.block = number[4];
    w.shared = int32_t(number[5]);
    w.panels = (numbers.bytes / 8 - 10) / 2;
    for (int64_t p = 0; p < w.panels; p++)
        w.widths[p] = number[10 + 2 * p], w.rows[p] = number[11 + 2 * p];
    const Extras extras{bias.as<void>(), a.as<void>(), b.as<void>(), rank, 0.5f, kind, kind};
#ifdef UNPACKS
    const Part part{values.as<void>(), 0, n, 0, k, kind};
    lowra_values(&w, &part, 2);
    if (w.signs) lowra_turn(&w, x.as<void>(), k, turned.as<void>(), m, kind, 0, 2);
    int64_t count = 0;
    for (int64_t p = 0; p < w.panels; p++) count += w.rows[p] * w.groups * levels_of(w.widths[p]);
    const Array sums(4 * count);
    lowra_code_sums(&w, &part, sums.as<float>(), 2);
#else
    lowra_product(&w, &extras, x.as<void>(), y.as<void>(), m, k, kind, 2);
#endif
    write_array(out, y);
    write_array(out, values);
    std::fclose(out);
    return 0;
}
