// AMX: the dot products of sixteen rows side by side with sixteen tokens are one instruction for
// every 64 columns. What blocks.h lays out for lanes is a tile as it stands: a line holds one word,
// four bytes, of each row.

#define TILES 1
constexpr int TILE_TOKENS = 16, TILE_STEPS = 16;  // lines of 64 bytes in a tile; words of a line

struct TileShapes {  // what LDTILECFG reads: eight whole tiles
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Holds the tiles for as long as it lives. Others of this thread, torch's kernels among them, set
// up tiles of their own whenever they need them.
struct WholeTiles {
    WholeTiles() {
        alignas(64) const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~WholeTiles() { _tile_release(); }
};

// Sums of VECTORS x 16 rows with two sets of 16 inputs that lie `apart` bytes from one another.
template <int VECTORS>
static void tile_sums(const uint8_t* const (&x)[2], int64_t apart, const uint8_t* values,
                      int64_t steps, uint8_t (&sums)[2][VECTORS][TILE_TOKENS][64]) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (VECTORS == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step += TILE_STEPS) {
        const uint8_t* lines = values + step * VECTORS * 64;
        _tile_loadd(6, lines, VECTORS * 64);
        _tile_loadd(4, x[0] + step * 4, apart);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(5, x[1] + step * 4, apart);
        _tile_dpbsud(1, 5, 6);
        if constexpr (VECTORS == 2) {
            _tile_loadd(7, lines + 64, VECTORS * 64);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[1][0], 64);
    if constexpr (VECTORS == 2) {
        _tile_stored(2, sums[0][1], 64);
        _tile_stored(3, sums[1][1], 64);
    }
}
