// Rows in parallel: threads take chunks of rows in turn and sleep when none are left. What a row
// gives must not depend on the thread that computes it, so results are the same for any count.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

template <class Body>  // body(first row, past the last row)
void parallel_rows(int64_t rows, int64_t chunk, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(chunk)) < rows;)
            body(begin, std::min(rows, begin + chunk));
    };
    const int64_t chunks = (rows + chunk - 1) / chunk;
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(threads, chunks); i++) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
