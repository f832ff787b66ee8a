// The slot-attention step with AVX2 and FMA, where the build switches them on for this file.

#include "slot_attention.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__GNUC__)

#define SPOT_LEVEL "avx2"

namespace {
typedef float Wide __attribute__((vector_size(32)));
using Lane = Wide;
constexpr bool kHasPairs = false;
constexpr int kTransposedRows = 6, kRowMajorRows = 6;
}  // namespace

#include "slot_attention_kernel.h"

const spot::Level* spot::slot_attention_avx2() { return &kLevel; }

#else

const spot::Level* spot::slot_attention_avx2() { return nullptr; }

#endif
