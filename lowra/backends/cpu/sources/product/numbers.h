// Numbers as they are stored: float32, bfloat16, float16.

#ifdef __F16C__
#include <immintrin.h>
#endif

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

static inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even; a NaN stays one
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);
}

static inline float from_float16(uint16_t x) {
#ifdef __F16C__
    return _cvtsh_ss(x);
#endif
    const uint32_t sign = uint32_t(x & 0x8000) << 16, body = x & 0x7fff;
    if (body >= 0x7c00) return from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
    // As a float32 exponent the value is 2^112 too small; subnormals come out right too.
    return from_bits(sign | to_bits(from_bits(body << 13) * 0x1p112f));
}

static inline uint16_t to_float16(float x) {  // to nearest, ties to even
    const uint32_t sign = (to_bits(x) >> 16) & 0x8000;
    uint32_t body = to_bits(x) & 0x7fffffff;
    if (body > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (body >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (body < 0x38800000)  // adding 0.5 leaves the subnormal's bits at the end
        return uint16_t(sign | (to_bits(from_bits(body) + 0.5f) - 0x3f000000));
    body += 0xfff + ((body >> 13) & 1) - (112u << 23);
    return uint16_t(sign | body >> 13);
}

static inline float read(const void* x, int64_t at, Kind kind) {
    if (kind == FLOAT32) return static_cast<const float*>(x)[at];
    const uint16_t bits = static_cast<const uint16_t*>(x)[at];
    return kind == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

static inline void write(void* x, int64_t at, Kind kind, float value) {
    if (kind == FLOAT32) static_cast<float*>(x)[at] = value;
    else static_cast<uint16_t*>(x)[at] = kind == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

static void read_row(const void* x, int64_t at, Kind kind, int64_t count, float* out) {
    if (kind == FLOAT32) {
        std::memcpy(out, static_cast<const float*>(x) + at, size_t(count) * 4);
    } else if (kind == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + at;
        for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(from[i]);
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + at;
        for (int64_t i = 0; i < count; i++) out[i] = from_float16(from[i]);
    }
}

static void write_row(void* x, int64_t at, Kind kind, int64_t count, const float* from) {
    if (kind == FLOAT32) {
        std::memcpy(static_cast<float*>(x) + at, from, size_t(count) * 4);
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(x) + at;
    if (kind == BFLOAT16) for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16(from[i]);
    else for (int64_t i = 0; i < count; i++) to[i] = to_float16(from[i]);
}
