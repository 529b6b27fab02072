// How 16 lanes of a tile shorter than 256 columns are gathered from its words.
struct TailStep {
    alignas(64) uint32_t word[16], shift[16];
};
struct TailWords {
    Lanes there;  // all bits of a word that is there, of 16
};
static inline TailWords tail_words(int count) {
    alignas(32) uint32_t there[16] = {};
    std::fill(there, there + std::min(count, 16), ~0u);
    return {load_lanes(there)};
}
static inline Lanes load_tail(const uint32_t* from, TailWords words) {
    const int* at = reinterpret_cast<const int*>(from);
    return {_mm256_maskload_epi32(at, words.there.low),
            _mm256_maskload_epi32(at + 8, words.there.high)};
}
static inline __m256i rotated(__m256i words, __m256i by) {
    const __m256i back = _mm256_sub_epi32(_mm256_set1_epi32(32), by);
    return _mm256_or_si256(_mm256_srlv_epi32(words, by), _mm256_sllv_epi32(words, back));
}
static inline Lanes tail_fields(Lanes words, const TailStep& step) {
    const Lanes at = load_lanes(step.word), by = load_lanes(step.shift);
    return {rotated(pick_words(words, at.low), by.low),
            rotated(pick_words(words, at.high), by.high)};
}
template <int BITS>  // of the plane
static inline Lanes gather_tail(const uint32_t* from, TailWords there, const TailStep& step) {
    if constexpr (BITS <= 2) return tail_fields(load_tail(from, there), step);
    const Lanes at = load_lanes(step.word), by = load_lanes(step.shift);
    const int* words = reinterpret_cast<const int*>(from);
    return {rotated(_mm256_i32gather_epi32(words, at.low, 4), by.low),
            rotated(_mm256_i32gather_epi32(words, at.high, 4), by.high)};
}
