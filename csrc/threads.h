// How the core runs in parallel: it knows no thread library, the binding passes torch's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>

namespace crystalformer {

struct Threads {
    int number;
    // Calls the function once on each of `number` threads, the calling one among them, and waits.
    std::function<void(const std::function<void()>&)> run;
    // Throws if the work is to be given up. To be called now and then, on any thread; it costs a look at a clock.
    std::function<void()> poll = [] {};

    // Calls work(first, last) for chunks of 0..count, each some times `chunk` long, in any order on any thread: each
    // item's result must depend on the item alone. `make` is called once on each thread and returns its `work`. What
    // any of them throws ends them all, and is thrown on.
    template <class Make>
    void for_chunks(int64_t count, int64_t chunk, const Make& make) const {
        const bool alone = number == 1 || count <= chunk;
        chunk *= count / chunk / MOST_CHUNKS + 1;
        std::atomic<int64_t> next{0};
        const auto work_off = [&] {
            int64_t first = next.fetch_add(chunk);
            if (first >= count) return;
            auto work = make();
            for (; first < count; first = next.fetch_add(chunk)) {
                work(first, std::min(first + chunk, count));
                poll();
            }
        };
        if (alone) return work_off();
        std::atomic<bool> failed{false};
        std::exception_ptr error;
        run([&] {
            try {
                work_off();
            } catch (...) {
                next = count;
                if (!failed.exchange(true)) error = std::current_exception();
            }
        });
        if (error) std::rethrow_exception(error);
    }

  private:
    static constexpr int64_t MOST_CHUNKS = 1024;  // more would share the work out no better
};

}  // namespace crystalformer
