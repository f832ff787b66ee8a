/* The plain C interface of spot_kernels' native library (loaded with ctypes, see spot_kernels/native.py).

   All arrays are owned by the caller, and dense and row-major unless said otherwise. No function throws or keeps state,
   and the threads that one starts have ended when it returns, so every one of them may be called from several threads at
   once. A function returns one of the codes below. */

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
    SPOT_BAD_SIZE = 1,  /* a negative size, or one that a function does not take; an unknown type */
    SPOT_BAD_COST = 2,  /* a cost is NaN or infinite, or so large (beyond 1e300) that sums of costs might be */
    SPOT_BAD_LABEL = 3, /* a label is negative or not below its number of labels */
    SPOT_NO_MEMORY = 4,
    SPOT_BAD_LEVEL = 5  /* an instruction set that this processor or this build does not have */
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

/* Calls work(data) in each thread of a team of at most `threads`, the caller among them, and returns when all have
   returned: what OpenMP's run-time library has as GOMP_parallel (flags is 0). */
typedef void (*spot_team)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);

/* A label map in the type it is kept in. */
enum { SPOT_UINT8 = 0, SPOT_INT16 = 1, SPOT_INT64 = 2 };

typedef struct {
    const void* data;
    int32_t type;
} spot_labels;

/* Co-occurrence of the labels of two maps, for each of `batch` pairs of maps.

   a, b    [batch, tokens], labels in 0...num_a-1 and 0...num_b-1
   valid   [batch, tokens] or NULL: a token with 0 here is not counted and its labels are not looked at
   threads at most that many; the result does not depend on it
   team    the threads to work on; NULL: they are started for the call, and end with it
   counts  [batch, num_a, num_b], written; on an error its content is undefined */
SPOT_API int spot_overlap_counts(const spot_labels* a, const spot_labels* b, const uint8_t* valid, int64_t batch,
                                 int64_t tokens, int64_t num_a, int64_t num_b, int32_t threads, spot_team team,
                                 int64_t* counts);

/* The mask that is largest at each pixel, the first of equals, after a bilinear resize (corners not aligned).

   masks   [batch, grid * grid, slots], finite; at most 256 slots
   fused   not 0: products are fused with additions as PyTorch does on processors with FMA; 0: as it does elsewhere.
           mask_labels.cpp says where; the labels then are those of PyTorch's own resize, for size > 64
   threads, team  as above
   labels  [batch, size, size], written */
SPOT_API int spot_mask_labels(const float* masks, int64_t batch, int64_t grid, int64_t slots, int64_t size,
                              int32_t fused, int32_t threads, spot_team team, uint8_t* labels);

/* One iteration of slot attention (spot_kernels/slot_attention.py has the formula): a = softmax of q k over heads and
   slots for each token; updates = sum over tokens of (a + eps) v, divided by the sum of (a + eps). */

enum { SPOT_FLOAT32 = 0, SPOT_BFLOAT16 = 1 };

/* The best instruction set there is, or a certain one: for tests, results differ by rounding only. */
enum {
    SPOT_LEVEL_BEST = 0,
    SPOT_LEVEL_BASELINE = 1,
    SPOT_LEVEL_AVX2 = 2,
    SPOT_LEVEL_AVX512 = 3,
    SPOT_LEVEL_AVX512BF16 = 4
};

typedef struct {
    int64_t batch, heads, tokens, slots, width;
    int32_t dtype;   /* of q, k, v, updates and their gradients */
    int32_t level;   /* instruction set, one of SPOT_LEVEL_... */
    int32_t threads; /* at most that many; small calls take fewer. The result does not depend on it */
    float eps;
    spot_team team;  /* the threads to work on; NULL: they are started for the call, and end with it */
} spot_slot_attention;

/* An array [batch, heads, rows, width] whose rows are dense; strides in elements, 0 allowed where it is read. */
typedef struct {
    void* data;
    int64_t batch_stride, head_stride, row_stride;
} spot_rows;

/* The name of the instruction set that a level stands for: "baseline" and so on; NULL for one that is not there. */
SPOT_API const char* spot_slot_attention_level(int32_t level);

/* q        [batch, heads, slots, width]
   k, v     [batch, heads, tokens, width]
   updates  [batch, heads, slots, width], written
   exact    the same in float32: the updates before they are rounded to dtype
   attn     [batch, tokens, slots] float32, written: a summed over heads; or NULL
   logits   [batch, heads, tokens, slots] float32, written; or NULL
   sums     [batch, heads, slots] float32, written: the sums of (a + eps) over tokens */
SPOT_API int spot_slot_attention_forward(const spot_slot_attention* size, const spot_rows* q, const spot_rows* k,
                                         const spot_rows* v, const spot_rows* updates, const spot_rows* exact,
                                         float* attn, float* logits, float* sums);

/* From the gradients of updates, attn and logits, each NULL where it is zero, and what forward has written to exact and
   sums, the gradients dq, dk and dv in the layouts of q, k and v. */
SPOT_API int spot_slot_attention_backward(const spot_slot_attention* size, const spot_rows* grad_updates,
                                          const float* grad_attn, const float* grad_logits, const spot_rows* q,
                                          const spot_rows* k, const spot_rows* v, const spot_rows* exact,
                                          const float* sums, const spot_rows* dq, const spot_rows* dk,
                                          const spot_rows* dv);

#ifdef __cplusplus
}
#endif

#endif
