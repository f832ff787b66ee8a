// Overlap counts of two label maps in one pass, which also checks the labels.

#include "sizes.h"
#include "spot_native.h"
#include "threads.h"

#include <algorithm>
#include <atomic>

namespace {

constexpr double kTokensPerNs = 1.0;  // of a core, roughly: decides how many threads pay

struct Sizes {
    int64_t batch, tokens, num_a, num_b;
    int32_t threads;
};

template <class A, class B>
int count(const A* a, const B* b, const uint8_t* valid, const Sizes& sizes, int64_t* counts) {
    const int64_t table = sizes.num_a * sizes.num_b;
    std::fill_n(counts, sizes.batch * table, int64_t{0});
    std::atomic<bool> good{true};
    const double nanoseconds = static_cast<double>(sizes.tokens) / kTokensPerNs;
    // an image's table is written by one thread alone, so nothing has to be added up afterwards
    spot::each_image(sizes.threads, sizes.batch, nanoseconds, [&](int64_t image) noexcept {
        int64_t* own = counts + image * table;
        for (int64_t i = image * sizes.tokens; i < (image + 1) * sizes.tokens; ++i) {
            if (valid && !valid[i]) {
                continue;
            }
            const int64_t label_a = a[i], label_b = b[i];
            if (label_a < 0 || label_a >= sizes.num_a || label_b < 0 || label_b >= sizes.num_b) {
                good = false;
                return;
            }
            ++own[label_a * sizes.num_b + label_b];
        }
    });
    return good ? SPOT_OK : SPOT_BAD_LABEL;
}

template <class A>
int count_with(const A* a, const spot_labels& b, const uint8_t* valid, const Sizes& sizes, int64_t* counts) {
    switch (b.type) {
        case SPOT_UINT8:
            return count(a, static_cast<const uint8_t*>(b.data), valid, sizes, counts);
        case SPOT_INT16:
            return count(a, static_cast<const int16_t*>(b.data), valid, sizes, counts);
        case SPOT_INT64:
            return count(a, static_cast<const int64_t*>(b.data), valid, sizes, counts);
    }
    return SPOT_BAD_SIZE;
}

}  // namespace

int spot_native_abi(void) { return 7; }

int spot_overlap_counts(const spot_labels* a, const spot_labels* b, const uint8_t* valid, int64_t batch, int64_t tokens,
                        int64_t num_a, int64_t num_b, int32_t threads, int64_t* counts) {
    if (batch == 0 && tokens >= 0 && num_a >= 0 && num_b >= 0) {
        return SPOT_OK;
    }
    if (!spot::countable({batch, tokens}) || !spot::countable({batch, num_a, num_b}) ||
        !spot::present(a->data, tokens) || !spot::present(b->data, tokens) || !spot::present(counts, num_a * num_b)) {
        return SPOT_BAD_SIZE;
    }
    const Sizes sizes{batch, tokens, num_a, num_b, threads};
    switch (a->type) {
        case SPOT_UINT8:
            return count_with(static_cast<const uint8_t*>(a->data), *b, valid, sizes, counts);
        case SPOT_INT16:
            return count_with(static_cast<const int16_t*>(a->data), *b, valid, sizes, counts);
        case SPOT_INT64:
            return count_with(static_cast<const int64_t*>(a->data), *b, valid, sizes, counts);
    }
    return SPOT_BAD_SIZE;
}
