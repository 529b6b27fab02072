// AVX-512: 16 lanes of 32 bits. A code is looked up by a permutation of a register that holds its
// table over and over, so the bits above the code need no clearing.
#include <immintrin.h>

#define LANES16 1
using Lanes = __m512i;
using Floats = __m512;
constexpr int BLOCK = 4;     // rows that share what is loaded of a token
constexpr bool IN_TURN = false;  // see avx2.h
constexpr int BLOCK_VECTORS = 2, BLOCK_INPUTS = 12;  // of blocks.h: sums fill most registers

static inline Lanes load_lanes(const uint8_t* from) { return _mm512_loadu_si512(from); }
static inline void store_lanes(uint8_t* to, Lanes x) { _mm512_storeu_si512(to, x); }

static inline Lanes load_words(const uint32_t* from) { return _mm512_loadu_si512(from); }
static inline Lanes load_half(const uint32_t* from) {  // 8 words, twice
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Into the second cache, or into the first, where there is little room. Not inlined, gcc takes it
// for a function without effect and drops it.
template <bool NEAR = false>
static inline __attribute__((always_inline)) void fetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from), NEAR ? _MM_HINT_T0 : _MM_HINT_T1);
}
template <int BY>
static inline Lanes shift(Lanes words) {
    if constexpr (BY == 0) return words;
    else return _mm512_srli_epi32(words, BY);
}
template <int LOW, int HIGH>  // other counts for lanes 0-7 and 8-15
static inline Lanes shift_halves(Lanes words) {
    const Lanes by = _mm512_inserti64x4(_mm512_set1_epi32(LOW), _mm256_set1_epi32(HIGH), 1);
    return _mm512_srlv_epi32(words, by);
}
template <int LOW, int HIGH>
static inline Lanes shift_halves_left(Lanes words) {
    const Lanes by = _mm512_inserti64x4(_mm512_set1_epi32(LOW), _mm256_set1_epi32(HIGH), 1);
    return _mm512_sllv_epi32(words, by);
}
template <int LOW, int HIGH>
static inline Lanes rotate_halves(Lanes words) {
    const Lanes by =
        _mm512_inserti64x4(_mm512_set1_epi32(LOW & 31), _mm256_set1_epi32(HIGH & 31), 1);
    return _mm512_rorv_epi32(words, by);
}
static inline Lanes choose(Lanes mask, Lanes yes, Lanes no) {  // bit by bit
    return _mm512_ternarylogic_epi32(mask, yes, no, 0xca);
}
static inline Lanes differing(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
static inline Lanes words_of(uint32_t word) { return _mm512_set1_epi32(int(word)); }
static inline Lanes masked(Lanes words, uint32_t mask) {
    return _mm512_and_si512(words, words_of(mask));
}
// Bits of `added` where the mask has them, to words that have none there.
static inline Lanes add_bits(Lanes words, uint32_t mask, Lanes added) {
    return _mm512_ternarylogic_epi32(words, words_of(mask), added, 0xf8);
}

// The lowest bits of every element, for joining planes.
static inline Lanes low_bits(int bits) {
    const uint32_t element = (1u << bits) - 1;
    if (ELEMENT == 1) return _mm512_set1_epi32(int(element * 0x01010101u));
    if (ELEMENT == 2) return _mm512_set1_epi32(int(element * 0x00010001u));
    return _mm512_set1_epi32(int(element));
}

template <int BYTES>  // a table of so many bytes, over and over
static inline Lanes spread(const uint8_t* table) {
    if constexpr (BYTES == 2) {
        int16_t value;
        std::memcpy(&value, table, 2);
        return _mm512_set1_epi16(value);
    } else if constexpr (BYTES == 4) {
        int32_t value;
        std::memcpy(&value, table, 4);
        return _mm512_set1_epi32(value);
    } else if constexpr (BYTES == 8) {
        int64_t value;
        std::memcpy(&value, table, 8);
        return _mm512_set1_epi64(value);
    } else if constexpr (BYTES == 16) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    } else if constexpr (BYTES == 32) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    } else {
        return _mm512_loadu_si512(table);
    }
}

template <bool = false>  // see avx2.h
static inline Lanes look_up(Lanes table, Lanes codes) {
    if constexpr (ELEMENT == 1) return _mm512_permutexvar_epi8(codes, table);
    else if constexpr (ELEMENT == 2) return _mm512_permutexvar_epi16(codes, table);
    else return _mm512_permutexvar_epi32(codes, table);
}

// sum += values . x, lane by lane; integers where elements are bytes, else floats.
static inline Lanes dot_lanes(Lanes sum, Lanes values, Lanes inputs) {
    if constexpr (ELEMENT == 1) return _mm512_dpbusd_epi32(sum, values, inputs);
#ifdef __AVX512BF16__
    else if constexpr (ELEMENT == 2)
        return _mm512_castps_si512(
            _mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)values, (__m512bh)inputs));
#endif
    else
        return _mm512_castps_si512(_mm512_fmadd_ps(
            _mm512_castsi512_ps(values), _mm512_castsi512_ps(inputs), _mm512_castsi512_ps(sum)));
}
// The same where sums fill the registers: gcc writes each to memory, turn by turn, unless it is told
// that a sum stays where it is.
static inline __attribute__((always_inline)) void add_dot(Lanes& sum, Lanes values, Lanes inputs) {
    if constexpr (ELEMENT == 1) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(values), "v"(inputs));
    else if constexpr (ELEMENT == 2)
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(inputs));
    else asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(inputs));
}
static inline __attribute__((always_inline)) void add_row_dot(Lanes& sum, Lanes values,
                                                              Lanes inputs) {  // see avx2.h
    add_dot(sum, values, inputs);
}

template <int PARTS>  // high and low activations in one
static inline Floats as_floats(const Lanes* sums) {
    if constexpr (ELEMENT != 1) return _mm512_castsi512_ps(sums[0]);
    const Floats high = _mm512_cvtepi32_ps(sums[0]);
    if constexpr (PARTS == 1) return high;
    else return _mm512_fmadd_ps(high, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sums[PARTS - 1]));
}

static inline Floats scaled(Floats x, float by) { return _mm512_mul_ps(x, _mm512_set1_ps(by)); }
static inline Floats times(Floats x, const float* by) {
    return _mm512_mul_ps(x, _mm512_loadu_ps(by));
}
static inline Floats add_scaled(Floats x, const float* values, float by) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(values), _mm512_set1_ps(by), x);
}

static inline Lanes zeros() { return _mm512_setzero_si512(); }
static inline Lanes everywhere(const void* from) {  // a word in every lane
    int word;
    std::memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}
// Sixteen rows of 16 words, `stride` bytes apart, to their columns, `out_stride` bytes apart.
static inline void transpose(const uint8_t* from, int64_t stride, uint8_t* out,
                             int64_t out_stride) {
    Lanes a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = load_lanes(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {  // a[4 i + j]: words j, j + 4, j + 8, j + 12 of four rows
        const Lanes even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const Lanes odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const Lanes even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const Lanes odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        store_lanes(out + j * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        store_lanes(out + (j + 4) * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        store_lanes(out + (j + 8) * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        store_lanes(out + (j + 12) * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

// Lanes times `scale` to columns column .. column + 15 of the row at `at`, those below k.
static inline void store_floats(Floats x, float scale, void* out, int64_t at, int64_t column,
                                int64_t k, Kind kind) {
    const int64_t count = std::min<int64_t>(16, k - column);
    if (count <= 0) return;
    const __mmask16 mask = __mmask16((1u << count) - 1);
    x = scaled(x, scale);
    if (kind == FLOAT32) {
        _mm512_mask_storeu_ps(static_cast<float*>(out) + at + column, mask, x);
        return;
    }
    __m256i halves;
    if (kind == FLOAT16) {
        halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {  // to nearest, ties to even
        const Lanes bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
        const Lanes odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        const Lanes up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const Lanes rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        halves = _mm512_cvtepi32_epi16(
            _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at + column, mask, halves);
}

// x += a . b for `count` floats at most 16; a in `kind`.
static inline Floats add_products(Floats x, const void* a, int64_t at, Kind kind, const float* b,
                                  int64_t count) {
    const __mmask16 mask = count >= 16 ? 0xffff : __mmask16((1u << count) - 1);
    Floats left;
    if (kind == FLOAT32) {
        left = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(a) + at);
    } else {
        const __m256i halves =
            _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(a) + at);
        left = kind == FLOAT16
                   ? _mm512_cvtph_ps(halves)
                   : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    return _mm512_fmadd_ps(left, _mm512_maskz_loadu_ps(mask, b), x);
}

static inline __m256 fold(Floats x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
static inline void sum_lanes(const Floats* x, float* out) {  // of 4
    const __m256 left = _mm256_hadd_ps(fold(x[0]), fold(x[1]));
    const __m256 right = _mm256_hadd_ps(fold(x[2]), fold(x[3]));
    const __m256 both = _mm256_hadd_ps(left, right);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
static inline Floats fold_quarters(Floats a, Floats b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
static inline void sum_batch(const Floats (&x)[16], float* out) {
    Floats pairs[8], fours[4];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                                 _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    _mm512_storeu_ps(out, fold_quarters(fold_quarters(fours[0], fours[1]),
                                        fold_quarters(fours[2], fours[3])));
}

// The first four butterflies of a Hadamard transform, within 16 lanes: the other of a pair, plus
// the lane itself where it is the lower one, minus it where it is the upper.
static inline Floats butterflies(Floats x) {
    const auto paired = [](Floats x, Floats other, __mmask16 upper) {
        const Floats one = _mm512_set1_ps(1);
        return _mm512_fmadd_ps(x, _mm512_mask_sub_ps(one, upper, _mm512_setzero_ps(), one), other);
    };
    x = paired(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
    x = paired(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
    x = paired(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    return paired(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
}
static inline Floats load_floats(const float* x) { return _mm512_loadu_ps(x); }
static inline void store_floats(Floats x, float* out) { _mm512_storeu_ps(out, x); }
static inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }

// Digits of rows of three levels: one of 64 bytes each.
struct Digits {
    Lanes rest;
    __mmask64 here;
};
static inline Digits first_digits(const uint8_t* bytes, int64_t count) {
    const __mmask64 here = count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    return {_mm512_maskz_loadu_epi8(here, bytes), here};
}
static inline void next_digits(Digits& d) {
    d.rest = _mm512_add_epi8(d.rest, _mm512_add_epi8(d.rest, d.rest));
}
static inline Lanes bytes_of(int value) { return _mm512_set1_epi8(char(value)); }
// Bytes zero, one or two where the digit is 0, 1 or 2; 0 past the tile.
static inline Lanes choose_level(const Digits& d, Lanes zero, Lanes one, Lanes two) {
    const __mmask64 some = _mm512_cmpge_epu8_mask(d.rest, _mm512_set1_epi8(86));
    const __mmask64 full = _mm512_cmpge_epu8_mask(d.rest, _mm512_set1_epi8(char(171)));
    const Lanes level = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(d.here, zero), some, one);
    return _mm512_mask_mov_epi8(level, full, two);
}
static inline Lanes widened(const uint8_t* bytes) {  // 16 to lanes
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
static inline Floats floats_of(Lanes bits) { return _mm512_castsi512_ps(bits); }
