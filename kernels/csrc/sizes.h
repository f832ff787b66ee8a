// Checks that every entry point makes of its arguments before it reads or writes anything.

#ifndef SPOT_SIZES_H
#define SPOT_SIZES_H

#include <cstdint>
#include <initializer_list>

namespace spot {

// Whether no size is negative and int64_t holds the bytes of an array of these sizes, even padded by 64 each, so that no
// product or sum of them overflows.
inline bool countable(std::initializer_list<int64_t> sizes) {
    double product = 1;
    for (const int64_t size : sizes) {
        if (size < 0) {
            return false;
        }
        product *= static_cast<double>(size) + 64;
    }
    return product < 1e18;
}

// Whether an array of `elements` has memory.
inline bool present(const void* data, int64_t elements) { return data || !elements; }

}  // namespace spot

#endif
