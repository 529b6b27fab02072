// Activations before a product: the input rotation, then the order and type that the dot products
// read.

// In place: each block of x times the Sylvester-Hadamard matrix; unscaled.
static void hadamard(float* x, int64_t k, int64_t block) {
    int64_t done = 1;
#ifdef LANES16
    if (block >= 16) {
        hadamard16(x, k);
        done = 16;
    }
#endif
    for (int64_t begin = 0; begin < k; begin += block)
        for (int64_t half = done; half < block; half *= 2)
            for (int64_t at = begin; at < begin + block; at += 2 * half) {
                float *low = x + at, *high = low + half;
                for (int64_t i = 0; i < half; i++) {
                    const float sum = low[i] + high[i], difference = low[i] - high[i];
                    low[i] = sum;
                    high[i] = difference;
                }
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
enum { OF_TOKENS, OF_PLAIN_TOKEN, OF_INTEGERS, OF_ROWS, OF_EXACT_ROW };

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
