// The slot-attention step for any processor: the vectors of 4 that x86-64 and AArch64 always have, or none where the
// compiler lacks GCC's vector types.

#define SPOT_LEVEL "baseline"

namespace {
#if defined(__GNUC__)
typedef float Wide __attribute__((vector_size(16)));
#else
using Wide = float;
#endif
using Lane = Wide;
constexpr bool kHasPairs = false;
constexpr int kTransposedRows = 6, kRowMajorRows = 6;
}  // namespace

#include "slot_attention_kernel.h"

const spot::Level* spot::slot_attention_baseline() { return &kLevel; }
