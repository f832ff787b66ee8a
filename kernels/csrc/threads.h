// Images of a batch spread over threads that are started for the call.

#ifndef SPOT_THREADS_H
#define SPOT_THREADS_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

namespace spot {

constexpr double kThreadNs = 4e5;  // least work that pays for a thread: several times what it takes to start one

// Calls image(b), which takes about `nanoseconds`, for each b below `batch`, in at most `threads` threads, this one among
// them, and in no more than pay. Threads take images one by one, so a slow thread does not hold up the others.
template <class Image>
void each_image(int64_t threads, int64_t batch, double nanoseconds, const Image& image) {
    const double paying = std::min(static_cast<double>(threads), static_cast<double>(batch) * nanoseconds / kThreadNs);
    const int64_t count = std::max<int64_t>(1, std::min(batch, static_cast<int64_t>(paying)));
    std::atomic<int64_t> next{0};
    const auto work = [&]() noexcept {
        for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < batch;) {
            image(b);
        }
    };
    std::vector<std::thread> others;
    others.reserve(count - 1);
    for (int64_t thread = 1; thread < count; ++thread) {
        try {
            others.emplace_back(std::cref(work));
        } catch (const std::system_error&) {  // the system has no more threads: those that run do all the work
            break;
        }
    }
    work();
    for (std::thread& other : others) {
        other.join();
    }
}

}  // namespace spot

#endif
