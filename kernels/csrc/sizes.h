// What an entry point asks of its arguments before it reads or writes anything.

#ifndef SPOT_SIZES_H
#define SPOT_SIZES_H

#include <cstdint>
#include <initializer_list>

namespace spot {

// Whether int64_t counts the bytes of an array of these sizes, none of them negative, with room for what is padded (up to
// 64 more of each), so that no product or sum of sizes that follows can overflow.
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

// Whether there is memory where an array of `elements` is expected.
inline bool there(const void* data, int64_t elements) { return data || !elements; }

}  // namespace spot

#endif
