/* The plain C interface of spot_kernels' native library (loaded with ctypes, see spot_kernels/native.py).

   All arrays are dense, row-major and owned by the caller. No function throws, keeps state or starts threads, so every
   one of them may be called from several threads at once. A function returns one of the codes below. */

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
    SPOT_BAD_SIZE = 1,  /* a negative size */
    SPOT_BAD_COST = 2,  /* a cost is NaN or infinite, or so large (beyond 1e300) that sums of costs might be */
    SPOT_BAD_LABEL = 3, /* a label is negative or not below its number of labels */
    SPOT_NO_MEMORY = 4
};

/* Raised whenever a signature or a meaning below changes: Python refuses a library with another number. */
SPOT_API int spot_native_abi(void);

/* Minimum-cost assignment of each of `batch` problems.

   cost        [batch, rows, columns]
   assignment  [batch, rows], written: the column of each row; with more rows than columns, -1 for a row without one.
   On an error the content of `assignment` is undefined.

   Exact (computed in double precision). Of several optimal assignments the one found by the search order that
   linear_assignment.cpp describes is returned; it depends on the costs alone. */
SPOT_API int spot_linear_assignment_f32(const float* cost, int64_t batch, int64_t rows, int64_t columns,
                                        int64_t* assignment);
SPOT_API int spot_linear_assignment_f64(const double* cost, int64_t batch, int64_t rows, int64_t columns,
                                        int64_t* assignment);

/* Co-occurrence of the labels of two maps, for each of `batch` pairs of maps.

   a, b    [batch, tokens], labels in 0...num_a-1 and 0...num_b-1
   valid   [batch, tokens] or NULL: a token with 0 here is not counted and its labels are not looked at
   counts  [batch, num_a, num_b], written; on an error its content is undefined */
SPOT_API int spot_overlap_counts(const int64_t* a, const int64_t* b, const uint8_t* valid, int64_t batch,
                                 int64_t tokens, int64_t num_a, int64_t num_b, int64_t* counts);

#ifdef __cplusplus
}
#endif

#endif
