// Rows in parallel, on torch's own threads: they take chunks of rows in turn, and what a row gives
// must not depend on the thread that computes it, so results are the same for any count.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// GOMP_parallel of the libgomp that torch has loaded, or null where torch has another pool.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Fork fork_team = nullptr;
extern "C" void lowra_use_pool(void* fork) { fork_team = reinterpret_cast<Fork>(fork); }

template <class Body>  // body(first row, past the last row)
void parallel_rows(int64_t rows, int64_t chunk, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(chunk)) < rows;)
            body(begin, std::min(rows, begin + chunk));
    };
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const int64_t team = std::min<int64_t>(threads, chunks);
    if (team <= 1) return work();
    if (fork_team) {
        fork_team([](void* task) { (*static_cast<decltype(work)*>(task))(); }, &work,
                  unsigned(team), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int64_t i = 1; i < team; i++) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}
