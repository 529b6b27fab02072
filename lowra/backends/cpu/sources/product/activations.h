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
static int64_t token_lanes(int64_t k, int element) {
    const int64_t tail = padded(k) % TILE * element / 4;
    return padded(k) / TILE * (TILE / 4) * element + (tail + 15) / 16 * 16;
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

// x ~ scale * (256 * high + low), or scale * high where LOW is false, in the order of `arrange`; x
// holds zeros up to a whole word. The same bytes by columns to `natural` [parts, natural_bytes],
// unless it is null.
template <bool LOW>
static Quantized quantize(const float* x, int64_t k, int8_t* high, int8_t* low, int8_t* natural) {
    const float most = largest(x, k), range = LOW ? 127 * 256 + 127 : 127;
    if (!(most < 1e38f) || (most > 0 && most < 1e-30f)) return {0, 0, true};
    const float inverse = most > 0 ? range / most : 0;
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const auto whole = [&](int64_t i) {
        return int32_t(to_bits(x[i] * inverse + 0x1.8p23f) - 0x4b400000u);
    };
    int32_t sum = 0;  // k is small enough (product.py)
    for (int64_t k0 = 0; k0 < padded(k); k0 += TILE) {
        const int64_t lanes = std::min(TILE, padded(k) - k0) / 4;
        for (int64_t i = 0; i < lanes; i++) {
            uint32_t upper = 0, lower = 0;
            for (int part = 0; part < 4; part++) {
                const int32_t q = whole(k0 + part * lanes + i);
                const int32_t rest = LOW ? int8_t(q) : 0;
                sum += q;
                upper |= (uint32_t((q - rest) >> (LOW ? 8 : 0)) & 255) << (8 * part);
                lower |= (uint32_t(rest) & 255) << (8 * part);
            }
            std::memcpy(high + k0 + 4 * i, &upper, 4);
            if (LOW) std::memcpy(low + k0 + 4 * i, &lower, 4);
        }
    }
    if (natural) {
        std::memset(natural, 0, size_t((LOW ? 2 : 1) * natural_bytes(k)));
        for (int64_t i = 0; i < k; i++) {
            const int32_t q = whole(i), rest = LOW ? int8_t(q) : 0;
            natural[i] = int8_t((q - rest) >> (LOW ? 8 : 0));
            if (LOW) natural[natural_bytes(k) + i] = int8_t(rest);
        }
    }
    return {most / range, float(sum), false};
}
