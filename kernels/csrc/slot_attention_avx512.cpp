// The slot-attention step with AVX-512, where the build switches it on for this file.

#include "slot_attention.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__GNUC__)

#define SPOT_LEVEL "avx512"

namespace {
typedef float Wide __attribute__((vector_size(64)));
typedef float Lane __attribute__((vector_size(32)));  // K is small: 7 slots fill 8 lanes better than 16
constexpr bool kHasPairs = false;
constexpr int kTransposedRows = 12, kRowMajorRows = 8;
}  // namespace

#include "slot_attention_kernel.h"

const spot::Level* spot::slot_attention_avx512() { return &kLevel; }

#else

const spot::Level* spot::slot_attention_avx512() { return nullptr; }

#endif
