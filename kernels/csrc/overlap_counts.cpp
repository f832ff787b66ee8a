// Overlap counts of two label maps in one pass, labels checked on the way.

#include "sizes.h"
#include "spot_native.h"

#include <algorithm>
#include <atomic>

#include "team.h"

namespace {

// How the labels are cut among threads, and how many a core reads in a nanosecond.
struct Cut {
    int64_t batch, tokens, num_a, num_b;
    int32_t threads;
    spot_team team;
};
constexpr double kTokensPerNs = 1.0;

template <class A, class B>
int count(const A* a, const B* b, const uint8_t* valid, const Cut& cut, int64_t* counts) {
    const int64_t table = cut.num_a * cut.num_b;
    std::fill_n(counts, cut.batch * table, int64_t{0});
    std::atomic<bool> good{true};
    spot::each_image(cut.team, cut.threads, cut.batch, static_cast<double>(cut.tokens) / kTokensPerNs,
                     [&](int64_t image) noexcept {
        int64_t* own = counts + image * table;
        for (int64_t i = image * cut.tokens; i < (image + 1) * cut.tokens; ++i) {
            if (valid && !valid[i]) {
                continue;
            }
            const int64_t label_a = a[i], label_b = b[i];
            if (label_a < 0 || label_a >= cut.num_a || label_b < 0 || label_b >= cut.num_b) {
                good = false;
                return;
            }
            ++own[label_a * cut.num_b + label_b];
        }
    });
    return good ? SPOT_OK : SPOT_BAD_LABEL;
}

template <class A>
int count_with(const A* a, const spot_labels& b, const uint8_t* valid, const Cut& cut, int64_t* counts) {
    switch (b.type) {
        case SPOT_UINT8:
            return count(a, static_cast<const uint8_t*>(b.data), valid, cut, counts);
        case SPOT_INT16:
            return count(a, static_cast<const int16_t*>(b.data), valid, cut, counts);
        case SPOT_INT64:
            return count(a, static_cast<const int64_t*>(b.data), valid, cut, counts);
    }
    return SPOT_BAD_SIZE;
}

}  // namespace

int spot_native_abi(void) { return 5; }

int spot_overlap_counts(const spot_labels* a, const spot_labels* b, const uint8_t* valid, int64_t batch, int64_t tokens,
                        int64_t num_a, int64_t num_b, int32_t threads, spot_team team, int64_t* counts) {
    if (batch == 0 && tokens >= 0 && num_a >= 0 && num_b >= 0) {
        return SPOT_OK;
    }
    if (!spot::countable({batch, tokens}) || !spot::countable({batch, num_a, num_b}) ||
        !spot::there(a->data, tokens) || !spot::there(b->data, tokens) || !spot::there(counts, num_a * num_b)) {
        return SPOT_BAD_SIZE;
    }
    const Cut cut{batch, tokens, num_a, num_b, threads, team};
    switch (a->type) {
        case SPOT_UINT8:
            return count_with(static_cast<const uint8_t*>(a->data), *b, valid, cut, counts);
        case SPOT_INT16:
            return count_with(static_cast<const int16_t*>(a->data), *b, valid, cut, counts);
        case SPOT_INT64:
            return count_with(static_cast<const int64_t*>(a->data), *b, valid, cut, counts);
    }
    return SPOT_BAD_SIZE;
}
