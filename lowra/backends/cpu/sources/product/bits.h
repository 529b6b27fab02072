// Rows of one bit and one token. A bit stays where it is in its byte: as the number 2^j it is
// multiplied, and sums are shifted in the end. Nothing is looked up and no word is shifted.

#ifdef LANES16
// Of BIT_ROWS rows from b.first + at on: sums of the activations at set bits.
template <class Codes>
static void bit_block(const Weight& w, const Tokens& t, const Panel& panel, const Tail& tail,
                      const Batch& b, int at, Floats (&out)[ROWS]) {
    Codes codes[BIT_ROWS];
    Lanes sums[BIT_ROWS][PARTS][4], masks[4];
    const uint8_t* x[PARTS];
    for (int r = 0; r < BIT_ROWS; r++) {
        codes[r].open(panel, b.first + std::min(at + r, b.count - 1), w.k);
        for (int p = 0; p < PARTS; p++)
            for (int s = 0; s < 4; s++) sums[r][p][s] = Lanes{};
    }
    for (int p = 0; p < PARTS; p++) x[p] = input(t, 0, p);
    // Step S reads bit 2 S of every byte in lanes 0 to 7, bit 2 S + 1 in lanes 8 to 15.
    for (int s = 0; s < 4; s++) masks[s] = halves_of_bytes(1 << (2 * s), 2 << (2 * s));
    const int64_t ahead = 2 * BIT_ROWS * row_words(w.k, 1);
    for (int64_t tile = 0; tile < padded(w.k) / TILE; tile++) {
        for (int r = 0; r < BIT_ROWS; r++) codes[r].load(ahead);
        each_step<4>([&](auto step) __attribute__((always_inline)) {
            constexpr int S = decltype(step)::value;
            for (int r = 0; r < BIT_ROWS; r++) {
                const Lanes bits = both(codes[r].p0, masks[S]);
                for (int p = 0; p < PARTS; p++)
                    sums[r][p][S] = dot(sums[r][p][S], bits, x[p] + S * 64);
            }
        });
        for (int p = 0; p < PARTS; p++) x[p] += 256;
    }
    const uint8_t zero_one[2] = {0, 1};
    const Lanes table = spread<2>(zero_one);
    for (int r = 0; r < BIT_ROWS; r++) {
        Lanes total[PARTS];
        for (int p = 0; p < PARTS; p++)
            total[p] = add_lanes(add_lanes(sums_shifted<0, 1>(sums[r][p][0]),
                                           sums_shifted<2, 3>(sums[r][p][1])),
                                 add_lanes(sums_shifted<4, 5>(sums[r][p][2]),
                                           sums_shifted<6, 7>(sums[r][p][3])));
        for (int s = 0; s < tail.steps; s++)
            for (int p = 0; p < PARTS; p++)
                total[p] = dot(total[p], look_up(table, codes[r].tail(tail, s)), x[p] + s * 64);
        out[at + r] = as_floats<PARTS>(total);
    }
}

// Steps and offsets of tables, for sums at set bits: level 0, and how far level 1 lies from it.
static void count_from_bits(const Weight& w, const Panel& panel, Batch& b) {
    for (int r = 0; r < b.count; r++) {
        const uint8_t* table = panel.tables + (w.shared ? 0 : 2 * (b.first + r));
        b.offset[r] += b.step[r] * float(table[0]);
        b.step[r] *= float(int(table[1]) - int(table[0]));
    }
}

template <class Codes>
static void bit_rows(const Weight& w, const Call& c, const Tokens& t, const Panel& panel,
                     const Tail& tail, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += ROWS) {
        Batch b = batch_of(w, panel, row, end, ROWS);
        count_from_bits(w, panel, b);
        Floats sums[ROWS] = {};
        for (int at = 0; at < b.count; at += BIT_ROWS)
            bit_block<Codes>(w, t, panel, tail, b, at, sums);
        finish_rows<ROWS>(w, c, t, b, sums, 0);
    }
}
#endif
