// lowra::lloyd_rows, lloyd_shared, lloyd_scales: weighted Lloyd on sorted rows.
//
// A row is sorted once and turned into prefix sums; every iteration at every width is then a
// binary search per threshold.
#include <cmath>
#include <limits>
#include <memory>

struct Row {  // sorted values; mass and moment are prefix sums of weight and weight * value
    std::vector<float> value;
    std::vector<double> mass, moment;
    double energy = 0;
};

struct Bins {
    std::vector<double> mass, moment;
    std::vector<size_t> edge;  // the first value past each threshold, where the last search found it
};

static uint32_t rising(float x) {  // an integer that orders as the float does
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// Least significant digit first; the low half of a key carries the column.
static void radix_sort(std::vector<uint64_t>& keys, std::vector<uint64_t>& spare) {
    constexpr int DIGITS = 4, SIZE = 256;
    size_t counts[DIGITS][SIZE] = {};
    for (uint64_t key : keys)
        for (int d = 0; d < DIGITS; d++) counts[d][(key >> (32 + 8 * d)) & 255]++;
    spare.resize(keys.size());
    for (int d = 0; d < DIGITS; d++) {
        size_t total = 0;
        for (size_t& count : counts[d]) { size_t here = count; count = total; total += here; }
        for (uint64_t key : keys) spare[counts[d][(key >> (32 + 8 * d)) & 255]++] = key;
        keys.swap(spare);
    }
}

static void sort_row(const float* value, const float* weight, int64_t k, Row& row) {
    thread_local std::vector<uint64_t> keys, spare;
    keys.resize(k);
    for (int64_t i = 0; i < k; i++) keys[i] = uint64_t(rising(value[i])) << 32 | uint64_t(i);
    radix_sort(keys, spare);
    row.value.resize(k);
    row.mass.resize(k + 1);
    row.moment.resize(k + 1);
    row.mass[0] = row.moment[0] = row.energy = 0;
    for (int64_t i = 0; i < k; i++) {
        const int64_t column = int64_t(keys[i] & 0xffffffffu);
        const double v = value[column], w = weight[column];
        row.value[i] = value[column];
        row.mass[i + 1] = row.mass[i] + w;
        row.moment[i + 1] = row.moment[i] + w * v;
        row.energy += w * v * v;
    }
}

constexpr size_t NOWHERE = ~size_t(0);

// How many values are at most `threshold`: a walk from `near`, for edges move little from one
// iteration to the next, or a binary search.
static size_t past(const std::vector<float>& values, double threshold, size_t near) {
    if (near == NOWHERE)
        return std::upper_bound(values.begin(), values.end(), threshold,
                                [](double t, float v) { return t < v; }) - values.begin();
    while (near < values.size() && values[near] <= threshold) near++;
    while (near > 0 && values[near - 1] > threshold) near--;
    return near;
}

// Mass and moment of the values nearest to each of scale * levels.
static void fill_bins(const Row& row, const double* levels, int64_t count, double scale, Bins& bins) {
    const bool fresh = bins.mass.empty();
    bins.mass.resize(count);
    bins.moment.resize(count);
    bins.edge.resize(count, row.value.size());
    size_t before = 0;
    for (int64_t j = 0; j < count; j++) {
        if (j + 1 < count) {
            const double threshold = scale * ((levels[j] + levels[j + 1]) / 2);
            bins.edge[j] = past(row.value, threshold, fresh ? NOWHERE : bins.edge[j]);
        }
        const size_t edge = bins.edge[j];
        bins.mass[j] = row.mass[edge] - row.mass[before];
        bins.moment[j] = row.moment[edge] - row.moment[before];
        before = edge;
    }
}

static double loss_of(const Row& row, const double* levels, int64_t count, double scale,
                      const Bins& bins) {
    double loss = row.energy;
    for (int64_t j = 0; j < count; j++) {
        const double level = scale * levels[j];
        loss += level * (level * bins.mass[j] - 2 * bins.moment[j]);
    }
    return std::max(loss, 0.0);
}

static double first_scale(const Row& row, const double* levels, int64_t count) {
    double square = 0;
    for (int64_t j = 0; j < count; j++) square += levels[j] * levels[j];
    return std::sqrt(row.energy / std::max(row.mass.back(), 1e-300)) / std::sqrt(square / count);
}

// The best scale of `levels` for the bins; the old one where no level with mass is off zero.
static double best_scale(const double* levels, int64_t count, const Bins& bins, double otherwise) {
    double above = 0, below = 0;
    for (int64_t j = 0; j < count; j++) {
        above += bins.moment[j] * levels[j];
        below += bins.mass[j] * levels[j] * levels[j];
    }
    return below > 0 ? std::max(above / below, 0.0) : std::max(otherwise, 0.0);
}

// levels [count] of one row, in place; returns the loss.
static double fit_row(const Row& row, double* levels, int64_t count, int64_t iterations,
                      double tolerance) {
    Bins bins;
    double before = std::numeric_limits<double>::infinity(), loss = row.energy;
    for (int64_t i = 0; i < iterations; i++) {
        fill_bins(row, levels, count, 1, bins);
        for (int64_t j = 0; j < count; j++)
            if (bins.mass[j] > 0) levels[j] = bins.moment[j] / bins.mass[j];
        loss = loss_of(row, levels, count, 1, bins);
        if (loss >= before * (1 - tolerance)) break;
        before = loss;
    }
    return loss;
}

// The best scale of one row for fixed levels; returns the loss.
static double fit_scale(const Row& row, const double* levels, int64_t count, int64_t iterations,
                        double tolerance, double& best) {
    Bins bins;
    double scale = best = first_scale(row, levels, count);
    double before = std::numeric_limits<double>::infinity(), least = row.energy;
    for (int64_t i = 0; i < iterations; i++) {
        fill_bins(row, levels, count, scale, bins);
        scale = best_scale(levels, count, bins, scale);
        const double loss = loss_of(row, levels, count, scale, bins);
        if (loss < before) { least = loss; best = scale; }
        if (loss >= before * (1 - tolerance)) break;
        before = loss;
    }
    return least;
}

struct Given {  // values [n, k]; weights [n, k], or one row of them for all (stride 0)
    const float *values, *weights;
    int64_t n, k, stride;
    void sort(int64_t row, Row& into) const {
        sort_row(values + row * k, weights + row * stride, k, into);
    }
};

// levels: for each width [n, counts[w]], starts in, results out; loss [widths, n].
extern "C" void lowra_lloyd_rows(const float* values, const float* weights, int64_t n, int64_t k,
                                 int64_t stride, double** levels, const int64_t* counts,
                                 int64_t widths, int64_t iterations, double tolerance, double* loss,
                                 int threads) {
    const Given given{values, weights, n, k, stride};
    parallel_rows(n, 16, threads, [&](int64_t begin, int64_t end) {
        Row row;
        for (int64_t r = begin; r < end; r++) {
            given.sort(r, row);
            for (int64_t w = 0; w < widths; w++)
                loss[w * n + r] =
                    fit_row(row, levels[w] + r * counts[w], counts[w], iterations, tolerance);
        }
    });
}

// levels: for each width [counts[w]], the same for all rows; scale and loss [widths, n].
extern "C" void lowra_lloyd_scales(const float* values, const float* weights, int64_t n, int64_t k,
                                   int64_t stride, double** levels, const int64_t* counts,
                                   int64_t widths, int64_t iterations, double tolerance,
                                   double* scale, double* loss, int threads) {
    const Given given{values, weights, n, k, stride};
    parallel_rows(n, 16, threads, [&](int64_t begin, int64_t end) {
        Row row;
        for (int64_t r = begin; r < end; r++) {
            given.sort(r, row);
            for (int64_t w = 0; w < widths; w++)
                loss[w * n + r] = fit_scale(row, levels[w], counts[w], iterations, tolerance,
                                            scale[w * n + r]);
        }
    });
}

// Shared levels of one width, in place: scales of rows and levels in turn, each in closed form.
static void fit_shared(const std::vector<Row>& rows, double* levels, int64_t count,
                       int64_t iterations, double tolerance, double* loss) {
    std::vector<double> now_loss(rows.size()), scale(rows.size()), now(levels, levels + count), above(count), below(count);
    for (size_t r = 0; r < rows.size(); r++) scale[r] = first_scale(rows[r], levels, count);
    std::vector<Bins> bins(rows.size());
    for (size_t r = 0; r < rows.size(); r++) loss[r] = rows[r].energy;
    double before = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < iterations; i++) {
        std::fill(above.begin(), above.end(), 0);
        std::fill(below.begin(), below.end(), 0);
        for (size_t r = 0; r < rows.size(); r++) {
            fill_bins(rows[r], now.data(), count, scale[r], bins[r]);
            scale[r] = best_scale(now.data(), count, bins[r], scale[r]);
            for (int64_t j = 0; j < count; j++) {
                above[j] += scale[r] * bins[r].moment[j];
                below[j] += scale[r] * scale[r] * bins[r].mass[j];
            }
        }
        for (int64_t j = 0; j < count; j++)
            if (below[j] > 0) now[j] = above[j] / below[j];
        double total = 0;
        for (size_t r = 0; r < rows.size(); r++)
            total += now_loss[r] = loss_of(rows[r], now.data(), count, scale[r], bins[r]);
        if (total < before) {
            std::copy(now.begin(), now.end(), levels);
            std::copy(now_loss.begin(), now_loss.end(), loss);
        }
        if (total >= before * (1 - tolerance)) break;
        before = total;
    }
}

// levels: for each width [counts[w]], starts in, results out; loss [widths, n]. Widths in parallel.
extern "C" void lowra_lloyd_shared(const float* values, const float* weights, int64_t n, int64_t k,
                                   int64_t stride, double** levels, const int64_t* counts,
                                   int64_t widths, int64_t iterations, double tolerance,
                                   double* loss, int threads) {
    const Given given{values, weights, n, k, stride};
    std::vector<Row> rows(n);
    parallel_rows(n, 16, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) given.sort(r, rows[r]);
    });
    parallel_rows(widths, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t w = begin; w < end; w++)
            fit_shared(rows, levels[w], counts[w], iterations, tolerance, loss + w * n);
    });
}

constexpr int64_t CANDIDATES = 128;

// Borders stepping evenly in i / k + (v_i - v_0) / (v_last - v_0); all of them in a short row.
static int64_t place_borders(const Row& row, size_t* edge) {
    const size_t k = row.value.size();
    if (k <= size_t(CANDIDATES)) {
        for (size_t i = 0; i <= k; i++) edge[i] = i;
        return int64_t(k) + 1;
    }
    const double low = row.value[0], range = std::max(row.value[k - 1] - low, 1e-300);
    size_t i = 0;
    edge[0] = 0;
    for (int64_t c = 1; c < CANDIDATES; c++) {
        const double step = double(c) * (2.0 / CANDIDATES);
        while (i < k && double(i) / double(k) + (row.value[i] - low) / range < step) i++;
        edge[c] = i;
    }
    edge[CANDIDATES] = k;
    return CANDIDATES + 1;
}

struct Cuts {  // cost[i][j] of values between borders, less their energy; least[l][j] in l + 1 parts
    static constexpr int64_t SIZE = CANDIDATES + 1, MOST = 16;
    int64_t size;
    size_t edge[SIZE];
    double mass[SIZE], moment[SIZE], cost[SIZE][SIZE], least[MOST][SIZE];

    static void lower(double* __restrict into, double before, const double* __restrict added,
                      int64_t count) {
        for (int64_t j = 0; j < count; j++) {
            const double through = before + added[j];
            into[j] = through < into[j] ? through : into[j];
        }
    }

    void fill(const Row& row, int64_t parts) {
        size = place_borders(row, edge);
        for (int64_t i = 0; i < size; i++) {
            mass[i] = row.mass[edge[i]];
            moment[i] = row.moment[edge[i]];
        }
        for (int64_t i = 0; i < size; i++)
            for (int64_t j = i; j < size; j++) {
                const double m = mass[j] - mass[i], s = moment[j] - moment[i];
                cost[i][j] = m > 0 ? -s * s / m : 0;
            }
        std::copy(cost[0], cost[0] + size, least[0]);
        for (int64_t l = 1; l < parts; l++) {
            std::copy(least[l - 1], least[l - 1] + size, least[l]);  // an empty last part
            for (int64_t i = 0; i < size; i++)
                lower(least[l] + i, least[l - 1][i], cost[i] + i, size - i);
        }
    }

    // Means of the parts of the best cut into `count`, from the last to the first.
    void levels(const Row& row, int64_t count, double* into) const {
        int64_t end = size - 1;
        for (int64_t l = count - 1; l >= 0; l--) {
            int64_t begin = 0;
            for (int64_t i = 0; l > 0 && i <= end; i++)
                if (least[l - 1][i] + cost[i][end] < least[l - 1][begin] + cost[begin][end])
                    begin = i;
            const double m = mass[end] - mass[begin];
            const size_t here = std::min(edge[begin], row.value.size() - 1);
            into[l] = m > 0 ? (moment[end] - moment[begin]) / m : row.value[here];
            end = begin;
        }
        for (int64_t l = 1; l < count; l++) into[l] = std::max(into[l], into[l - 1]);
    }
};

// levels: for each count [n, counts[w]], at most 16 each.
extern "C" void lowra_optimal_levels(const float* values, const float* weights, int64_t n,
                                     int64_t k, int64_t stride, double** levels,
                                     const int64_t* counts, int64_t widths, int threads) {
    const Given given{values, weights, n, k, stride};
    const int64_t most = *std::max_element(counts, counts + widths);
    parallel_rows(n, 16, threads, [&](int64_t begin, int64_t end) {
        Row row;
        const auto cuts = std::make_unique<Cuts>();
        for (int64_t r = begin; r < end; r++) {
            given.sort(r, row);
            cuts->fill(row, most);
            for (int64_t w = 0; w < widths; w++)
                cuts->levels(row, counts[w], levels[w] + r * counts[w]);
        }
    });
}
