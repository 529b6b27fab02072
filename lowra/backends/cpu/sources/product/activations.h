// Activations before a product: the input rotation, then the order and type that the dot products
// read.

#ifdef LANES16
// Butterflies within blocks of 64 elements, of 16 where blocks are shorter: how long they were.
static int64_t hadamard_in_registers(float* x, int64_t k, int64_t block) {
    if (block < 64) {
        for (int64_t i = 0; i < k; i += 16) store_floats(butterflies(load_floats(x + i)), x + i);
        return 16;
    }
    for (float* end = x + k; x < end; x += 64) {
        const Floats a = butterflies(load_floats(x)), b = butterflies(load_floats(x + 16));
        const Floats c = butterflies(load_floats(x + 32)), d = butterflies(load_floats(x + 48));
        const Floats sums[2] = {plus(a, b), plus(c, d)}, rest[2] = {minus(a, b), minus(c, d)};
        store_floats(plus(sums[0], sums[1]), x);
        store_floats(plus(rest[0], rest[1]), x + 16);
        store_floats(minus(sums[0], sums[1]), x + 32);
        store_floats(minus(rest[0], rest[1]), x + 48);
    }
    return 64;
}
#endif

// low and high [half] become their sums and differences.
static void butterfly(float* __restrict low, float* __restrict high, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float sum = low[i] + high[i], difference = low[i] - high[i];
        low[i] = sum;
        high[i] = difference;
    }
}

// Two steps at once: of a, b, c and d [half], which follow one another.
static void two_butterflies(float* __restrict a, float* __restrict b, float* __restrict c,
                            float* __restrict d, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float left = a[i] + b[i], left_rest = a[i] - b[i];
        const float right = c[i] + d[i], right_rest = c[i] - d[i];
        a[i] = left + right;
        b[i] = left_rest + right_rest;
        c[i] = left - right;
        d[i] = left_rest - right_rest;
    }
}

// In place: each block of x times the Sylvester-Hadamard matrix; unscaled.
static void hadamard(float* x, int64_t k, int64_t block) {
    int64_t done = 1;
#ifdef LANES16
    if (block >= 16) done = hadamard_in_registers(x, k, block);
#endif
    for (float* end = x + k; x < end; x += block) {
        int64_t half = done;
        for (; 4 * half <= block; half *= 4)
            for (float* at = x; at < x + block; at += 4 * half)
                two_butterflies(at, at + half, at + 2 * half, at + 3 * half, half);
        if (half < block) butterfly(x, x + half, half);
    }
}

// x~ = H D x of one token.
static void rotate(const Weight& w, float* x) {
    if (!w.signs) return;
    for (int64_t i = 0; i < w.k; i++) x[i] *= w.signs[i];
    hadamard(x, w.k, w.block);
}

// 32-bit lanes that the elements of a token fill, the tail tile padded to 16 lanes.
static int64_t filled_lanes(int64_t k, int element) {
    return (padded(k) * element / 4 + 15) / 16 * 16;
}
// From token to token: many are read side by side, and must not compete for one place in cache.
static int64_t token_lanes(int64_t k, int element) {
    const int64_t lanes = filled_lanes(k, element);
    return lanes % 512 ? lanes : lanes + 16;
}

// Lane i of a tile of t columns holds columns i, i + t / parts, ...: those that lie in the bytes,
// halves or whole of one word (docs/storage-format.md, section 5). x holds zeros up to a
// whole word.
template <class T, int PARTS>
static void arrange(const T* x, int64_t k, T* out) {
    for (int64_t k0 = 0; k0 < padded(k); k0 += TILE) {
        const int64_t lanes = std::min(TILE, padded(k) - k0) / PARTS;
        for (int64_t i = 0; i < lanes; i++)
            for (int64_t part = 0; part < PARTS; part++)
                out[k0 + i * PARTS + part] = x[k0 + part * lanes + i];
    }
}

// Memory of this thread that starts on a cache line; each PURPOSE has its own.
template <int PURPOSE>
static char* scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes + 64) memory.resize(size_t(bytes + 64));
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}
enum { OF_TOKENS, OF_PLAIN_TOKEN, OF_INTEGERS, OF_ROWS, OF_EXACT_ROW, OF_ZEROS };

struct Quantized {
    float scale, sum;  // of the integers
    bool exact;        // no integers can hold these activations
};

static float largest(const float* x, int64_t k) {
    uint32_t most = 0;  // bits order magnitudes, and put NaN above infinity
    for (int64_t i = 0; i < k; i++) most = std::max(most, to_bits(x[i]) & 0x7fffffff);
    return from_bits(most);
}

// Bytes of a token in the order of columns; loads may reach a ternary tile past the last.
static int64_t natural_bytes(int64_t k) { return (k + TERNARY_TILE + 127) / 64 * 64; }

// Loops on plain arrays that the compiler turns into vectors. Adding 1.5 * 2^23 rounds to nearest
// even and leaves the integer in the low bits.
static int32_t to_integers(const float* x, float inverse, int64_t count, int32_t* __restrict out) {
    int32_t sum = 0;  // k is small enough (product.py)
    for (int64_t i = 0; i < count; i++) {
        out[i] = int32_t(to_bits(x[i] * inverse + 0x1.8p23f) - 0x4b400000u);
        sum += out[i];
    }
    return sum;
}
template <bool LOW>  // what is left without the lowest byte, a signed one
static inline int32_t high_byte(int32_t q) {
    return LOW ? (q - int8_t(q)) >> 8 : q;
}
// Words of the high bytes, and of the low ones, of four integers `lanes` apart.
template <bool LOW>
static void join_bytes(const int32_t* q, int64_t lanes, uint32_t* __restrict high,
                       uint32_t* __restrict low) {
    const auto join = [](int32_t a, int32_t b, int32_t c, int32_t d) {
        return (uint32_t(a) & 255) | (uint32_t(b) & 255) << 8 | (uint32_t(c) & 255) << 16 |
               uint32_t(d) << 24;
    };
    const int32_t *b = q + lanes, *c = b + lanes, *d = c + lanes;
    for (int64_t i = 0; i < lanes; i++) {
        high[i] = join(high_byte<LOW>(q[i]), high_byte<LOW>(b[i]), high_byte<LOW>(c[i]),
                       high_byte<LOW>(d[i]));
        if (LOW) low[i] = join(q[i], b[i], c[i], d[i]);
    }
}

// x ~ scale * (256 * high + low), or scale * high where LOW is false, in the order of `arrange`; x
// holds zeros up to a whole word. The same bytes by columns to `natural` [parts, natural_bytes],
// unless it is null.
template <bool LOW>
static Quantized quantize(const float* x, int64_t k, int8_t* high, int8_t* low, int8_t* natural) {
    const float most = largest(x, k), range = LOW ? 127 * 256 + 127 : 127;
    if (!(most < 1e38f) || (most > 0 && most < 1e-30f)) return {0, 0, true};
    const float inverse = most > 0 ? range / most : 0;
    int32_t* whole = reinterpret_cast<int32_t*>(scratch<OF_INTEGERS>(padded(k) * 4));
    const int32_t sum = to_integers(x, inverse, padded(k), whole);
    for (int64_t k0 = 0; k0 < padded(k); k0 += TILE) {
        const int64_t lanes = std::min(TILE, padded(k) - k0) / 4;
        join_bytes<LOW>(whole + k0, lanes, reinterpret_cast<uint32_t*>(high + k0),
                        reinterpret_cast<uint32_t*>(LOW ? low + k0 : nullptr));
    }
    if (natural) {
        std::memset(natural, 0, size_t((LOW ? 2 : 1) * natural_bytes(k)));
        for (int64_t i = 0; i < k; i++) natural[i] = int8_t(high_byte<LOW>(whole[i]));
        for (int64_t i = 0; LOW && i < k; i++) natural[natural_bytes(k) + i] = int8_t(whole[i]);
    }
    return {most / range, float(sum), false};
}
