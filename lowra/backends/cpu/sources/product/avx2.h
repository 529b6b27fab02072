// AVX2: 16 lanes of 32 bits in two registers, for the same code as avx512.h. A code is looked up
// among 16 bytes; a looked-up byte is at most 127, so that no sum of two products saturates.
#include <immintrin.h>

#define LANES16 1
struct Lanes {
    __m256i low, high;
};
struct Floats {
    __m256 low, high;
};
constexpr int BLOCK = 2;  // rows that share what is loaded of a token
constexpr bool IN_TURN = true;  // one row of them after another, since registers are few
constexpr int BLOCK_VECTORS = 1, BLOCK_INPUTS = 4;  // of blocks.h: sums fill most registers

static inline const __m256i* as_vector(const void* from) {
    return static_cast<const __m256i*>(from);
}
static inline Lanes load_lanes(const void* from) {
    return {_mm256_loadu_si256(as_vector(from)), _mm256_loadu_si256(as_vector(from) + 1)};
}
static inline void store_lanes(void* to, Lanes x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), x.low);
    _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, x.high);
}
static inline Lanes twice(__m256i x) { return {x, x}; }
static inline Lanes load_words(const uint32_t* from) { return load_lanes(from); }
static inline Lanes load_half(const uint32_t* from) {  // 8 words, twice
    return twice(_mm256_loadu_si256(as_vector(from)));
}
template <bool NEAR = false>  // see avx512.h
static inline __attribute__((always_inline)) void fetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from), NEAR ? _MM_HINT_T0 : _MM_HINT_T1);
}
template <int LOW, int HIGH>  // other counts for lanes 0-7 and 8-15
static inline Lanes shift_halves(Lanes words) {
    return {_mm256_srli_epi32(words.low, LOW), _mm256_srli_epi32(words.high, HIGH)};
}
template <int BY>
static inline Lanes shift(Lanes words) {
    return shift_halves<BY, BY>(words);
}
template <int LOW, int HIGH>
static inline Lanes shift_halves_left(Lanes words) {
    return {_mm256_slli_epi32(words.low, LOW), _mm256_slli_epi32(words.high, HIGH)};
}
static inline __m256i rotated(__m256i x, int by) {  // to the right
    return _mm256_or_si256(_mm256_srli_epi32(x, by & 31), _mm256_slli_epi32(x, 32 - (by & 31)));
}
template <int LOW, int HIGH>
static inline Lanes rotate_halves(Lanes words) {
    return {rotated(words.low, LOW), rotated(words.high, HIGH)};
}
static inline Lanes choose(Lanes mask, Lanes yes, Lanes no) {  // bit by bit
    const auto one = [](__m256i mask, __m256i yes, __m256i no) {
        return _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no));
    };
    return {one(mask.low, yes.low, no.low), one(mask.high, yes.high, no.high)};
}
static inline Lanes differing(Lanes a, Lanes b) {
    return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
static inline Lanes words_of(uint32_t word) { return twice(_mm256_set1_epi32(int(word))); }
static inline Lanes masked(Lanes words, uint32_t mask) {
    const __m256i all = _mm256_set1_epi32(int(mask));
    return {_mm256_and_si256(words.low, all), _mm256_and_si256(words.high, all)};
}
// Bits of `added` where the mask has them, to words that have none there.
static inline Lanes add_bits(Lanes words, uint32_t mask, Lanes added) {
    added = masked(added, mask);
    return {_mm256_or_si256(words.low, added.low), _mm256_or_si256(words.high, added.high)};
}
static inline Lanes low_bits(int bits) {  // of every element, for joining planes
    const uint32_t element = (1u << bits) - 1;
    return twice(_mm256_set1_epi32(int(ELEMENT == 1 ? element * 0x01010101u : element)));
}

// A table of so many bytes, over and over; one that fills both registers is looked up in two.
template <int BYTES>
static inline Lanes spread(const uint8_t* table) {
    if constexpr (BYTES == 64) return load_lanes(table);
    uint8_t bytes[32];
    for (int i = 0; i < 32; i += BYTES) std::memcpy(bytes + i, table, size_t(std::min(BYTES, 32)));
    return twice(_mm256_loadu_si256(as_vector(bytes)));
}
// One of 16 words for every lane.
static inline __m256i pick_words(Lanes words, __m256i lanes) {  // bit 3: of which half
    const __m256 low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(words.low, lanes));
    const __m256 high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(words.high, lanes));
    const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28));
    return _mm256_castps_si256(_mm256_blendv_ps(low, high, which));
}
template <bool CLEAR = false>  // whether the top bit of every byte is zero
static inline Lanes look_up(Lanes table, Lanes codes) {
    const auto bytes = [&](__m256i code) {
        if constexpr (CLEAR) return _mm256_shuffle_epi8(table.low, code);
        else return _mm256_shuffle_epi8(table.low, _mm256_and_si256(code, _mm256_set1_epi8(15)));
    };
    if constexpr (ELEMENT == 1) return {bytes(codes.low), bytes(codes.high)};
    else return {pick_words(table, codes.low), pick_words(table, codes.high)};
}

static inline Floats floats_of(Lanes bits) {
    return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)};
}
// sum += values . x, lane by lane; integers where elements are bytes, else floats.
static inline __m256i dot_half(__m256i sum, __m256i values, __m256i inputs) {
    if constexpr (ELEMENT == 1) {
        const __m256i pairs = _mm256_maddubs_epi16(values, inputs);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    } else {
        return _mm256_castps_si256(_mm256_fmadd_ps(_mm256_castsi256_ps(values),
                                                   _mm256_castsi256_ps(inputs),
                                                   _mm256_castsi256_ps(sum)));
    }
}
static inline Lanes dot_lanes(Lanes sum, Lanes values, Lanes inputs) {
    return {dot_half(sum.low, values.low, inputs.low), dot_half(sum.high, values.high, inputs.high)};
}
static inline void add_dot(Lanes& sum, Lanes values, Lanes inputs) {
    sum = dot_lanes(sum, values, inputs);
}
// The same where all lanes are added up in the end. Sums of two parts fill the registers: they
// take one each, and term after term, or gcc would add up in trees and keep these in memory.
static inline __attribute__((always_inline)) void add_row_dot(Lanes& sum, Lanes values,
                                                              Lanes inputs) {
    if constexpr (PARTS == 1) return add_dot(sum, values, inputs);
    sum.low = dot_half(dot_half(sum.low, values.low, inputs.low), values.high, inputs.high);
    asm("" : "+x"(sum.low));
}
template <int PARTS>  // high and low activations in one
static inline Floats as_floats(const Lanes* sums) {
    if constexpr (ELEMENT != 1) return floats_of(sums[0]);
    const Floats high{_mm256_cvtepi32_ps(sums[0].low), _mm256_cvtepi32_ps(sums[0].high)};
    if constexpr (PARTS == 1) return high;
    const Lanes rest = sums[PARTS - 1];
    const __m256 by = _mm256_set1_ps(256);
    return {_mm256_fmadd_ps(high.low, by, _mm256_cvtepi32_ps(rest.low)),
            _mm256_fmadd_ps(high.high, by, _mm256_cvtepi32_ps(rest.high))};
}
static inline Floats scaled(Floats x, float by) {
    const __m256 factor = _mm256_set1_ps(by);
    return {_mm256_mul_ps(x.low, factor), _mm256_mul_ps(x.high, factor)};
}

static inline Floats times(Floats x, const float* by) {
    return {_mm256_mul_ps(x.low, _mm256_loadu_ps(by)), _mm256_mul_ps(x.high, _mm256_loadu_ps(by + 8))};
}
static inline Floats add_scaled(Floats x, const float* values, float by) {
    const __m256 factor = _mm256_set1_ps(by);
    return {_mm256_fmadd_ps(_mm256_loadu_ps(values), factor, x.low),
            _mm256_fmadd_ps(_mm256_loadu_ps(values + 8), factor, x.high)};
}

static inline Lanes zeros() { return twice(_mm256_setzero_si256()); }
static inline Lanes everywhere(const void* from) {  // a word in every lane
    int word;
    std::memcpy(&word, from, 4);
    return twice(_mm256_set1_epi32(word));
}
// Sixteen rows of 16 words, `stride` bytes apart, to their columns, `out_stride` bytes apart.
static inline void transpose(const uint8_t* from, int64_t stride, uint8_t* out,
                             int64_t out_stride) {
    for (int row = 0; row < 16; row++)
        for (int word = 0; word < 16; word++)
            std::memcpy(out + word * out_stride + row * 4, from + row * stride + word * 4, 4);
}

static inline __m128i to_halves(__m256 x, Kind kind) {  // to nearest, ties to even
    if (kind == FLOAT16) return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
// Lanes times `scale` to columns column .. column + 15 of the row at `at`, those below k.
static inline void store_floats(Floats x, float scale, void* out, int64_t at, int64_t column,
                                int64_t k, Kind kind) {
    const int64_t count = std::min<int64_t>(16, k - column);
    if (count <= 0) return;
    x = scaled(x, scale);
    alignas(32) uint8_t bytes[64];
    if (kind == FLOAT32) {
        _mm256_store_ps(reinterpret_cast<float*>(bytes), x.low);
        _mm256_store_ps(reinterpret_cast<float*>(bytes) + 8, x.high);
    } else {
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), to_halves(x.low, kind));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes) + 1, to_halves(x.high, kind));
    }
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    uint8_t* to = static_cast<uint8_t*>(out) + (at + column) * size;
    if (count == 16) std::memcpy(to, bytes, kind == FLOAT32 ? 64 : 32);
    else std::memcpy(to, bytes, size_t(count * size));
}

static inline __m256 read_eight(const void* a, int64_t at, Kind kind) {
    if (kind == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(a) + at);
    const __m128i halves = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(a) + at));
    if (kind == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
// x += a . b for `count` floats at most 16; a in `kind`.
static inline Floats add_products(Floats x, const void* a, int64_t at, Kind kind, const float* b,
                                  int64_t count) {
    float left[16] = {0}, right[16] = {0};
    if (count < 16) {
        for (int64_t i = 0; i < count; i++) left[i] = read(a, at + i, kind), right[i] = b[i];
        a = left, at = 0, kind = FLOAT32, b = right;
    }
    return {_mm256_fmadd_ps(read_eight(a, at, kind), _mm256_loadu_ps(b), x.low),
            _mm256_fmadd_ps(read_eight(a, at + 8, kind), _mm256_loadu_ps(b + 8), x.high)};
}

static inline __m256 fold(Floats x) { return _mm256_add_ps(x.low, x.high); }
static inline void sum_lanes(const Floats* x, float* out) {  // of 4
    const __m256 left = _mm256_hadd_ps(fold(x[0]), fold(x[1]));
    const __m256 right = _mm256_hadd_ps(fold(x[2]), fold(x[3]));
    const __m256 both = _mm256_hadd_ps(left, right);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
static inline void sum_batch(const Floats (&x)[16], float* out) {
    for (int i = 0; i < 16; i += 4) sum_lanes(x + i, out + i);
}

// The first four butterflies of a Hadamard transform, within 16 lanes: the other of a pair, plus
// the lane itself where it is the lower one, minus it where it is the upper.
static inline Floats butterflies(Floats x) {
    const __m256 one = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
    const __m256 two = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 four = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    const auto eight = [&](__m256 v) {
        v = _mm256_fmadd_ps(v, one, _mm256_permute_ps(v, 0xb1));
        v = _mm256_fmadd_ps(v, two, _mm256_permute_ps(v, 0x4e));
        return _mm256_fmadd_ps(v, four, _mm256_permute2f128_ps(v, v, 1));
    };
    const __m256 low = eight(x.low), high = eight(x.high);
    return {_mm256_add_ps(low, high), _mm256_sub_ps(low, high)};
}
static inline Floats load_floats(const float* x) {
    return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
static inline void store_floats(Floats x, float* out) {
    _mm256_storeu_ps(out, x.low);
    _mm256_storeu_ps(out + 8, x.high);
}
static inline Floats plus(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
static inline Floats minus(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

// Digits of rows of three levels: one of 64 bytes each.
struct Digits {
    Lanes rest, here;
};
static inline Digits first_digits(const uint8_t* bytes, int64_t count) {
    if (count >= 64) return {load_lanes(bytes), twice(_mm256_set1_epi8(-1))};
    uint8_t all[64] = {0}, here[64] = {0};
    std::memcpy(all, bytes, size_t(count));
    std::memset(here, 255, size_t(count));
    return {load_lanes(all), load_lanes(here)};
}
static inline void next_digits(Digits& d) {
    const auto three = [](__m256i x) { return _mm256_add_epi8(x, _mm256_add_epi8(x, x)); };
    d.rest = {three(d.rest.low), three(d.rest.high)};
}
static inline Lanes bytes_of(int value) { return twice(_mm256_set1_epi8(char(value))); }
// Bytes zero, one or two where the digit is 0, 1 or 2; 0 past the tile.
static inline Lanes choose_level(const Digits& d, Lanes zero, Lanes one, Lanes two) {
    const auto half = [](__m256i rest, __m256i zero, __m256i one, __m256i two) {
        const auto reached = [rest](int from) {
            const __m256i least = _mm256_set1_epi8(char(from));
            return _mm256_cmpeq_epi8(_mm256_max_epu8(rest, least), rest);
        };
        return _mm256_blendv_epi8(_mm256_blendv_epi8(zero, one, reached(86)), two, reached(171));
    };
    return {_mm256_and_si256(d.here.low, half(d.rest.low, zero.low, one.low, two.low)),
            _mm256_and_si256(d.here.high, half(d.rest.high, zero.high, one.high, two.high))};
}
static inline Lanes widened(const uint8_t* bytes) {  // 16 to lanes
    const auto eight = [](const uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    };
    return {eight(bytes), eight(bytes + 8)};
}
