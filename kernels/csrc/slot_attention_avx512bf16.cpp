// The slot-attention step with AVX-512 and its products of bfloat16 pairs, where the build switches them on for this file.

#include "slot_attention.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BF16__) && defined(__GNUC__)

#include <immintrin.h>

#define SPOT_LEVEL "avx512bf16"

namespace {
typedef float Wide __attribute__((vector_size(64)));
typedef float Lane __attribute__((vector_size(32)));  // K is small: 7 slots fill 8 lanes better than 16
constexpr bool kHasPairs = true;
constexpr int kTransposedRows = 12, kRowMajorRows = 8;

// sum + x0 y0 + x1 y1 for the two bfloat16 numbers in each lane of x and y.
inline Lane dot_pairs(Lane x, Lane y, Lane sum) {
    return (Lane)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)y);
}
}  // namespace

#include "slot_attention_kernel.h"

const spot::Level* spot::slot_attention_avx512bf16() { return &kLevel; }

#else

const spot::Level* spot::slot_attention_avx512bf16() { return nullptr; }

#endif
