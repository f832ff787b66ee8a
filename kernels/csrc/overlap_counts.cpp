// Overlap counts of two label maps in one pass, labels checked on the way.

#include "spot_native.h"

#include <algorithm>

namespace {

template <class A, class B>
int count(const A* a, const B* b, const uint8_t* valid, int64_t batch, int64_t tokens, int64_t num_a, int64_t num_b,
          int64_t* counts) {
    std::fill_n(counts, batch * num_a * num_b, int64_t{0});
    for (int64_t image = 0; image < batch; ++image, counts += num_a * num_b) {
        for (int64_t i = image * tokens; i < (image + 1) * tokens; ++i) {
            if (valid && !valid[i]) {
                continue;
            }
            const int64_t label_a = a[i], label_b = b[i];
            if (label_a < 0 || label_a >= num_a || label_b < 0 || label_b >= num_b) {
                return SPOT_BAD_LABEL;
            }
            ++counts[label_a * num_b + label_b];
        }
    }
    return SPOT_OK;
}

template <class A>
int count_with(const A* a, const spot_labels& b, const uint8_t* valid, int64_t batch, int64_t tokens, int64_t num_a,
               int64_t num_b, int64_t* counts) {
    switch (b.type) {
        case SPOT_UINT8:
            return count(a, static_cast<const uint8_t*>(b.data), valid, batch, tokens, num_a, num_b, counts);
        case SPOT_INT16:
            return count(a, static_cast<const int16_t*>(b.data), valid, batch, tokens, num_a, num_b, counts);
        case SPOT_INT64:
            return count(a, static_cast<const int64_t*>(b.data), valid, batch, tokens, num_a, num_b, counts);
    }
    return SPOT_BAD_SIZE;
}

}  // namespace

int spot_native_abi(void) { return 4; }

int spot_overlap_counts(const spot_labels* a, const spot_labels* b, const uint8_t* valid, int64_t batch, int64_t tokens,
                        int64_t num_a, int64_t num_b, int64_t* counts) {
    if (batch < 0 || tokens < 0 || num_a < 0 || num_b < 0) {
        return SPOT_BAD_SIZE;
    }
    switch (a->type) {
        case SPOT_UINT8:
            return count_with(static_cast<const uint8_t*>(a->data), *b, valid, batch, tokens, num_a, num_b, counts);
        case SPOT_INT16:
            return count_with(static_cast<const int16_t*>(a->data), *b, valid, batch, tokens, num_a, num_b, counts);
        case SPOT_INT64:
            return count_with(static_cast<const int64_t*>(a->data), *b, valid, batch, tokens, num_a, num_b, counts);
    }
    return SPOT_BAD_SIZE;
}
