// How the core runs in parallel: it knows no thread library, the binding passes torch's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace crystalformer {

struct Threads {
    int number;
    // Calls the function once on each of `number` threads and waits.
    std::function<void(const std::function<void()>&)> run;

    // Calls work(first, last) for chunks of 0..count, in any order on any thread: each item's result must depend on
    // the item alone. `make` is called once on each thread and returns its `work`.
    template <class Make>
    void for_chunks(int64_t count, int64_t chunk, const Make& make) const {
        if (count <= chunk || number == 1) {
            if (count > 0) make()(int64_t(0), count);
            return;
        }
        std::atomic<int64_t> next{0};
        run([&] {
            int64_t first = next.fetch_add(chunk);
            if (first >= count) return;
            auto work = make();
            for (; first < count; first = next.fetch_add(chunk)) work(first, std::min(first + chunk, count));
        });
    }
};

}  // namespace crystalformer
