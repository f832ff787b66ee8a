// Work in several threads: those of an OpenMP run-time library that the caller names, or started for the call.

#ifndef SPOT_TEAM_H
#define SPOT_TEAM_H

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "spot_native.h"

namespace spot {

// Calls work() in at most `threads` threads at once, this one among them.
template <class Work>
void in_team(spot_team team, int64_t threads, const Work& work) {
    if (threads > 1 && team) {
        const auto call = [](void* data) { (*static_cast<const Work*>(data))(); };
        team(call, const_cast<Work*>(&work), static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (int64_t thread = 1; thread < threads; ++thread) {
        try {
            others.emplace_back(std::cref(work));
        } catch (const std::system_error&) {  // no more threads to be had: those there do the work
            break;
        }
    }
    work();
    for (std::thread& other : others) {
        other.join();
    }
}

// Calls image(b), which takes some `nanoseconds`, for each b below `batch`, in at most `threads` threads and in no more
// than are worth it.
template <class Image>
void each_image(spot_team team, int64_t threads, int64_t batch, double nanoseconds, const Image& image) {
    // What it takes to wake a thread of a team, or to start one, several times over.
    const double least = team ? 1e5 : 4e5;
    const double worth = std::min(static_cast<double>(threads), static_cast<double>(batch) * nanoseconds / least);
    std::atomic<int64_t> next{0};
    const auto work = [&]() noexcept {
        for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < batch;) {
            image(b);
        }
    };
    in_team(team, std::max<int64_t>(1, std::min(batch, static_cast<int64_t>(worth))), work);
}

}  // namespace spot

#endif
