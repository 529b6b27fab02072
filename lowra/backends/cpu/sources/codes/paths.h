// The best path of a column through the trellis of a run (lowra/compiler/trellis.py), by Viterbi's
// algorithm. A state is the lowest stored bits of the last six rows, the last one's lowest; the next
// row's bit makes of state p, and of p + 32, the states 2 p and 2 p + 1. Into 2 p they step with a
// level of subset s(p) = 2 p[0] + (p[1] ^ p[3]) and s(p) ^ 2, into 2 p + 1 the other way round.

constexpr int STATES = 64, HALF = STATES / 2, PARTS = HALF / LANES, CYCLE = 16 / LANES;

struct Steps { Integers even[PARTS], odd[PARTS]; };  // by state: whether p + 32 came before

struct Levels { Integers part[VECTORS]; };
struct Subsets {  // of each row, by subset: the least error and its level
    Column error[4];
    Levels level[4];
    float error_of(int subset, int row) const {
        return reinterpret_cast<const float*>(&error[subset])[row];
    }
    int level_of(int subset, int row) const {
        return reinterpret_cast<const int32_t*>(&level[subset])[row];
    }
};

static void find_subsets(const Block& block, const Column& wanted, const Column& scale,
                         Subsets& out) {
    for (int subset = 0; subset < 4; subset++)
        for (int v = 0; v < VECTORS; v++) {
            Vector least = Vector{} + __builtin_inff();
            Integers level = {};
            for (int l = subset; l < block.levels_used; l += 4) {
                const Vector off = wanted.part[v] - block.levels[l].part[v] * scale.part[v];
                const Vector error = off * off;
                const Integers closer = error < least;
                least = closer ? error : least;
                level = closer ? Integers{} + l : level;
            }
            out.error[subset].part[v] = least;
            out.level[subset].part[v] = level;
        }
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

// Lanes of two vectors in turn: a0 b0 a1 b1 ...
static void interleave(Vector a, Vector b, Vector* out) {
#if defined(__AVX512F__)
    out[0] = PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    out[1] = PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
    out[0] = PICK(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    out[1] = PICK(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    out[0] = PICK(a, b, 0, 4, 1, 5);
    out[1] = PICK(a, b, 2, 6, 3, 7);
#endif
}

struct Patterns {  // bits of s(p) for p = 0 .. 15, as masks
    Integers high[CYCLE], low[CYCLE];
};

static Patterns patterns() {
    Patterns made;
    for (int p = 0; p < 16; p++) {
        made.high[p / LANES][p % LANES] = -(p & 1);
        made.low[p / LANES][p % LANES] = -((p >> 1 ^ p >> 3) & 1);
    }
    return made;
}

// Costs of all states after one row, from those before it.
static void step_states(const Vector* before, const Subsets& subsets, int row, const Patterns& of,
                        Vector* after, Steps& steps) {
    Vector same[CYCLE], other[CYCLE], error[4];
    for (int s = 0; s < 4; s++) error[s] = Vector{} + subsets.error_of(s, row);
    for (int g = 0; g < CYCLE; g++) {
        const Vector first = of.low[g] ? error[1] : error[0];
        const Vector second = of.low[g] ? error[3] : error[2];
        same[g] = of.high[g] ? second : first;
        other[g] = of.high[g] ? first : second;
    }
    for (int g = 0; g < PARTS; g++) {
        const Vector a = before[g], b = before[g + PARTS];
        const Vector x = same[g % CYCLE], y = other[g % CYCLE];
        const Vector even_a = a + x, even_b = b + y, odd_a = a + y, odd_b = b + x;
        steps.even[g] = even_b < even_a;
        steps.odd[g] = odd_b < odd_a;
        interleave(steps.even[g] ? even_b : even_a, steps.odd[g] ? odd_b : odd_a, after + 2 * g);
    }
}

static int best_state(const Vector* cost) {
    const float* of = reinterpret_cast<const float*>(cost);
    return int(std::min_element(of, of + STATES) - of);
}

// Codes of a column's rows along the best path, and their values.
static void best_path(const Block& block, const Column& wanted, const Column& scale, Column& value,
                      Codes& codes) {
    static const Patterns of = patterns();
    Subsets subsets;
    find_subsets(block, wanted, scale, subsets);
    Steps steps[ROWS];
    Vector cost[2][STATES / LANES];
    for (Vector& far : cost[0]) far = Vector{} + 1e30f;
    cost[0][0][0] = 0;
    const int rows = int(block.rows);
    for (int r = 0; r < rows; r++)
        step_states(cost[r % 2], subsets, r, of, cost[(r + 1) % 2], steps[r]);
    uint8_t* code = reinterpret_cast<uint8_t*>(&codes);
    float* to = reinterpret_cast<float*>(&value);
    const float* by = reinterpret_cast<const float*>(&scale);
    const float* levels = reinterpret_cast<const float*>(block.levels.data());
    int state = best_state(cost[rows % 2]);
    for (int r = rows - 1; r >= 0; r--) {
        const int p = state >> 1;
        const Integers* taken = state & 1 ? steps[r].odd : steps[r].even;
        const bool far = taken[p / LANES][p % LANES];
        const int turned = (state & 1) ^ far;
        const int subset = (2 * (p & 1) + ((p >> 1 ^ p >> 3) & 1)) ^ 2 * turned;
        code[r] = uint8_t(subsets.level_of(subset, r));
        to[r] = levels[code[r] * ROWS + r] * by[r];
        state = p + HALF * far;
    }
    for (int r = rows; r < ROWS; r++) code[r] = code[rows - 1], to[r] = to[rows - 1];
}
