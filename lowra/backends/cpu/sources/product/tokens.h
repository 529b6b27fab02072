// Tokens prepared for the rows of a weight, once per product.

struct Tokens {
    const float* rotated;     // [m, padded k], zeros past k; null where no row needs it
    const uint8_t* inputs;    // [m, PARTS, lanes] of 4 bytes
    const int8_t* natural;    // [m, PARTS, natural_bytes] in the order of columns, or null
    const Quantized* numbers; // [m]
    const float* hidden;      // [m, rank padded to 16]: scaling * x A'
    int64_t lanes, rank;
    bool exact;
};

static int64_t hidden_stride(int64_t rank) { return (rank + 15) / 16 * 16; }
static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where a weight and the tokens meet, in bytes from the start of the memory of one product.
struct Places {
    int64_t lanes, rotated, inputs, numbers, natural, hidden, total;
    bool floats;  // whether all tokens are kept in float32
    Places(const Weight& w, const Call& c, bool floats) : floats(floats) {
        lanes = token_lanes(w.k, ELEMENT);
        rotated = 0;
        inputs = floats ? aligned(c.m * padded(w.k) * 4) : 0;
        numbers = inputs + aligned(c.m * PARTS * lanes * 4 + 64);
        natural = numbers + aligned(c.m * int64_t(sizeof(Quantized)));
        const bool digits = ELEMENT == 1 && has_width(w, TERNARY);
        hidden = natural + (digits ? c.m * PARTS * natural_bytes(w.k) : 0);
        total = hidden + c.m * hidden_stride(c.more.rank) * 4 + 64;
    }
};

static Quantized prepare(const Weight& w, const float* rotated, int64_t lanes, int8_t* inputs,
                         [[maybe_unused]] int8_t* natural) {
    // The last steps of a token may lie past its columns: they add nothing.
    for (int part = 0; part < PARTS; part++)
        std::memset(inputs + part * lanes * 4 + padded(w.k) * ELEMENT, 0,
                    size_t(lanes * 4 - padded(w.k) * ELEMENT));
    if constexpr (ELEMENT == 1) {
        return quantize<PARTS == 2>(rotated, w.k, inputs, inputs + lanes * 4, natural);
    } else if constexpr (ELEMENT == 4) {
        std::memcpy(inputs, rotated, size_t(padded(w.k)) * 4);
    } else {
        uint16_t* halves = reinterpret_cast<uint16_t*>(scratch<OF_ROWS>(padded(w.k) * 2));
        for (int64_t i = 0; i < padded(w.k); i++) halves[i] = to_bfloat16(rotated[i]);
        arrange<uint16_t, 2>(halves, w.k, reinterpret_cast<uint16_t*>(inputs));
    }
    return {1, 0, false};
}

// scaling * (x A') for A [rank, k] of `kind`; zeros where `out` goes on.
static void shrink(const Extras& more, const float* x, int64_t k, float* out) {
    std::memset(out, 0, size_t(hidden_stride(more.rank)) * 4);
    for (int64_t r = 0; r < more.rank; r += 4) {  // four rows share what is loaded of x
        float sums[4] = {};
#ifdef LANES16
        Floats lanes[4] = {};
        for (int64_t i = 0; i < k; i += 16)
            for (int j = 0; j < 4; j++)
                lanes[j] = add_products(lanes[j], more.a, std::min(r + j, more.rank - 1) * k + i,
                                        more.factor_kind, x + i, std::min<int64_t>(16, k - i));
        sum_lanes(lanes, sums);
#else
        for (int64_t j = 0; j < 4 && r + j < more.rank; j++)
            for (int64_t i = 0; i < k; i++)
                sums[j] += read(more.a, (r + j) * k + i, more.factor_kind) * x[i];
#endif
        for (int64_t j = 0; j < 4 && r + j < more.rank; j++) out[r + j] = more.scaling * sums[j];
    }
}

// Token i of a call, into the memory of the product at `base`.
static void prepare_token(const Weight& w, const Call& c, const Places& places, char* base,
                          int64_t i) {
    const Extras& more = c.more;
    float* rotated = places.floats
                         ? reinterpret_cast<float*>(base + places.rotated) + i * padded(w.k)
                         : reinterpret_cast<float*>(scratch<OF_PLAIN_TOKEN>(padded(w.k) * 4));
    read_row(c.x, i * c.x_stride, c.kind, w.k, rotated);
    std::memset(rotated + w.k, 0, size_t(padded(w.k) - w.k) * 4);
    float* hidden = reinterpret_cast<float*>(base + places.hidden) + i * hidden_stride(more.rank);
    shrink(more, rotated, w.k, hidden);
    rotate(w, rotated);
    int8_t* natural = nullptr;
    if (places.hidden > places.natural)
        natural = reinterpret_cast<int8_t*>(base + places.natural) +
                  i * PARTS * natural_bytes(w.k);
    int8_t* inputs = reinterpret_cast<int8_t*>(base + places.inputs) + i * PARTS * places.lanes * 4;
    reinterpret_cast<Quantized*>(base + places.numbers)[i] =
        prepare(w, rotated, places.lanes, inputs, natural);
}

static Tokens prepare_tokens(const Weight& w, const Call& c, const Places& places, char* base) {
    const int threads = c.m * w.k * (c.more.rank + 8) < 1000000 ? 1 : c.threads;
    parallel_rows(c.m, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) prepare_token(w, c, places, base, i);
    });
    const Quantized* numbers = reinterpret_cast<const Quantized*>(base + places.numbers);
    bool exact = false;
    for (int64_t m = 0; m < c.m; m++) exact |= numbers[m].exact;
    return {places.floats ? reinterpret_cast<const float*>(base + places.rotated) : nullptr,
            reinterpret_cast<const uint8_t*>(base + places.inputs),
            reinterpret_cast<const int8_t*>(base + places.natural), numbers,
            reinterpret_cast<const float*>(base + places.hidden), places.lanes, c.more.rank, exact};
}
