// Numbers of levels of trellis rows, for many fields at a time: each at the bottom of four bits, of
// which the uppermost is zero. For the order of their bits see table_place.

template <class Load>  // of words, at what is stored `bytes` from a row's own
static inline INLINE Lanes low_bit(const Before& before, const Load& load) {
    return differing(load(before.two), load(before.four));
}
template <class Load>  // the high bit, but for what the row itself adds
static inline INLINE Lanes added_bit(const Before& before, const Load& load) {
    return differing(load(before.one), load(before.six));
}

// From fields of one bit: even fields for lanes 0-7, odd ones for lanes 8-15; every other of either.
static inline INLINE void number_bits(const uint32_t* own, const Before& before, Lanes& even,
                                      Lanes& odd) {
    const auto words = [own](intptr_t bytes) INLINE { return load_half(moved(own, bytes)); };
    const Lanes low = low_bit(before, words);
    const Lanes high = differing(words(0), added_bit(before, words));
    const Lanes both =
        choose(words_of(0x55555555), shift_halves<0, 1>(low), shift_halves_left<1, 0>(high));
    even = masked(both, 0x33333333);
    odd = masked(shift<2>(both), 0x33333333);
}

// From fields of two bits, even and odd ones apart.
static inline INLINE void number_pairs(const uint32_t* own, const Before& before, Lanes& even,
                                       Lanes& odd) {
    const auto words = [own](intptr_t bytes) INLINE { return load_words(moved(own, bytes)); };
    const Lanes low = low_bit(before, words);
    const Lanes upper = differing(words(0), masked(added_bit(before, words), 0x55555555));
    even = add_bits(masked(upper, 0x33333333), 0x44444444, shift_halves_left<2, 2>(low));
    odd = add_bits(masked(shift<2>(upper), 0x33333333), 0x44444444, low);
}

// Of step s of a tail: a number at the bottom of every byte.
template <int PLANE>
static inline INLINE Lanes number_tail(const uint32_t* own, const Before& before, const Tail& t,
                                       int s) {
    const auto words = [&](intptr_t bytes) INLINE { return load_tail(moved(own, bytes), t.words); };
    const Lanes low = tail_fields(low_bit(before, words), t.wide[s]);
    const Lanes added = added_bit(before, words);
    if constexpr (PLANE == 1) {
        const Lanes high = tail_fields(differing(words(0), added), t.wide[s]);
        return add_bits(masked(low, 0x01010101), 0x02020202, shift_halves_left<1, 1>(high));
    } else {
        const Lanes upper = differing(words(0), masked(added, 0x55555555));
        return add_bits(masked(tail_fields(upper, t.wide[s]), 0x03030303), 0x04040404,
                        shift_halves_left<2, 2>(low));
    }
}
