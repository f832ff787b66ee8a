// Overlap counts of two label maps in one pass, labels checked on the way.

#include "spot_native.h"

#include <algorithm>

int spot_native_abi(void) { return 3; }

int spot_overlap_counts(const int64_t* a, const int64_t* b, const uint8_t* valid, int64_t batch, int64_t tokens,
                        int64_t num_a, int64_t num_b, int64_t* counts) {
    if (batch < 0 || tokens < 0 || num_a < 0 || num_b < 0) {
        return SPOT_BAD_SIZE;
    }
    std::fill_n(counts, batch * num_a * num_b, int64_t{0});
    for (int64_t image = 0; image < batch; ++image, counts += num_a * num_b) {
        for (int64_t i = image * tokens; i < (image + 1) * tokens; ++i) {
            if (valid && !valid[i]) {
                continue;
            }
            if (a[i] < 0 || a[i] >= num_a || b[i] < 0 || b[i] >= num_b) {
                return SPOT_BAD_LABEL;
            }
            ++counts[a[i] * num_b + b[i]];
        }
    }
    return SPOT_OK;
}
