/* The plain C interface of spot_kernels' native library (loaded with ctypes, see spot_kernels/native.py).

   The caller owns all arrays, which are dense and row-major. No function throws or keeps state, and the threads that it
   starts have ended when it returns, so several threads may call it at once. Functions return one of the codes below. */

#ifndef SPOT_NATIVE_H
#define SPOT_NATIVE_H

#include <stdint.h>

#if defined(_WIN32)
#define SPOT_API __declspec(dllexport)
#else
#define SPOT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    SPOT_OK = 0,
    SPOT_BAD_SIZE = 1,  /* a negative size, or one that the function does not take; a null array; an unknown type */
    SPOT_BAD_COST = 2,  /* a cost is NaN, infinite, or so large (beyond 1e300) that sums of costs might overflow */
    SPOT_BAD_LABEL = 3, /* a label is negative or not below its number of labels */
    SPOT_NO_MEMORY = 4
};

/* Raised whenever a signature or a meaning below changes: Python refuses a library with another number. */
SPOT_API int spot_native_abi(void);

/* Minimum-cost assignment of each of `batch` problems.

   cost        [batch, rows, columns]
   num_columns [batch] or NULL: the columns that each problem has, at most `columns`; the costs after them are not read
   threads     the most threads to use; the result does not depend on it
   assignment  [batch, rows], written: the column of each row; with more rows than columns, -1 for a row without one
   On an error the content of `assignment` is undefined.

   Exact, in double precision. Of several optimal assignments it returns the one that the search order of
   linear_assignment.cpp finds first, which depends on the costs alone. */
SPOT_API int spot_linear_assignment_f32(const float* cost, const int64_t* num_columns, int64_t batch, int64_t rows,
                                        int64_t columns, int32_t threads, int64_t* assignment);
SPOT_API int spot_linear_assignment_f64(const double* cost, const int64_t* num_columns, int64_t batch, int64_t rows,
                                        int64_t columns, int32_t threads, int64_t* assignment);

/* A label map and the type of its labels. */
enum { SPOT_UINT8 = 0, SPOT_INT16 = 1, SPOT_INT64 = 2 };

typedef struct {
    const void* data;
    int32_t type;
} spot_labels;

/* Co-occurrence of the labels of two maps, for each of `batch` pairs of maps.

   a, b    [batch, tokens], labels in 0...num_a-1 and 0...num_b-1
   valid   [batch, tokens] or NULL: a token with 0 is not counted and its labels are not read
   threads the most threads to use; the result does not depend on it
   counts  [batch, num_a, num_b], written; on an error its content is undefined */
SPOT_API int spot_overlap_counts(const spot_labels* a, const spot_labels* b, const uint8_t* valid, int64_t batch,
                                 int64_t tokens, int64_t num_a, int64_t num_b, int32_t threads, int64_t* counts);

/* The mask that is largest at each pixel, the first of equals, after a bilinear resize (corners not aligned).

   masks   [batch, grid * grid, slots], finite; at most 256 slots
   fused   not 0: products are fused with additions as PyTorch does on processors with FMA; 0: as it does elsewhere
           (mask_labels.cpp). For size > 64 the labels then equal those of PyTorch's own resize
   threads as above
   labels  [batch, size, size], written */
SPOT_API int spot_mask_labels(const float* masks, int64_t batch, int64_t grid, int64_t slots, int64_t size,
                              int32_t fused, int32_t threads, uint8_t* labels);

#ifdef __cplusplus
}
#endif

#endif
