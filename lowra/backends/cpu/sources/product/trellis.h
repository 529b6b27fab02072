// Trellis rows: the lowest bit that a row stores at a column does not name a level; with those of
// the rows before it, added up modulo 2, it makes the two lowest bits of the level's number
// (lowra/compiler/trellis.py). Neighbouring rows have one layout, so whole words are added up.

constexpr int64_t RUN = 64;  // rows of a panel that depend on one another

// Where the words of the first plane lie 1, 2, 4 and 6 rows before a row: bytes from its own.
// Before its run there are rows of zeros.
struct Before {
    intptr_t one, two, four, six;
};

static inline const uint32_t* moved(const uint32_t* own, intptr_t bytes) {
    return reinterpret_cast<const uint32_t*>(reinterpret_cast<intptr_t>(own) + bytes);
}

static Before rows_before(const Panel& panel, int64_t row, int64_t k) {
    const int64_t size = row_words(k, first_plane(panel.width)) * 4;
    const intptr_t zeros = reinterpret_cast<intptr_t>(scratch<OF_ZEROS>(size)) -
                           reinterpret_cast<intptr_t>(panel.words) - row * size;
    const auto back = [&](int64_t rows) { return row % RUN < rows ? zeros : -rows * size; };
    return {back(1), back(2), back(4), back(6)};
}
