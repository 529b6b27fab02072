// How 16 lanes of a tile shorter than 256 columns are gathered from its words, at most 32.
struct TailStep {
    alignas(64) uint32_t word[16], shift[16];
};
struct TailWords {
    __mmask16 low, high;  // words that are there, of 16 each
};
static inline TailWords tail_words(int count) {
    const auto some = [](int n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0); };
    return {some(count), some(count - 16)};
}
static inline Lanes load_tail(const uint32_t* from, TailWords there) {
    return _mm512_maskz_loadu_epi32(there.low, from);
}
static inline Lanes tail_fields(Lanes words, const TailStep& step) {
    words = _mm512_permutexvar_epi32(_mm512_load_si512(step.word), words);
    return _mm512_rorv_epi32(words, _mm512_load_si512(step.shift));
}
template <int BITS>  // of the plane
static inline Lanes gather_tail(const uint32_t* from, TailWords there, const TailStep& step) {
    const Lanes low = load_tail(from, there);
    if constexpr (BITS <= 2) return tail_fields(low, step);
    const Lanes high = _mm512_maskz_loadu_epi32(there.high, from + 16);
    const Lanes words = _mm512_permutex2var_epi32(low, _mm512_load_si512(step.word), high);
    return _mm512_rorv_epi32(words, _mm512_load_si512(step.shift));
}
