// What the slot-attention step shares between its entry points (slot_attention.cpp) and the arithmetic, which is compiled
// once for each instruction set (slot_attention_kernel.h).

#ifndef SPOT_SLOT_ATTENTION_H
#define SPOT_SLOT_ATTENTION_H

#include "spot_native.h"

namespace spot {

// Slots are padded to whole vectors of 8 lanes, widths to whole vectors of 16: every instruction set divides those.
constexpr int64_t kSlotLanes = 8;
constexpr int64_t kWidthLanes = 16;
// Tokens that are worked on at a time: their rows of k and v stay in the first-level cache between two products.
constexpr int64_t kBlock = 32;

// Buffers are whole vectors long, and start where a vector may: one that straddles two cache lines costs two.
constexpr int64_t kAlignment = 64;

constexpr int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// One call. Its tokens are cut into work items, one batch entry × `chunk` tokens each, by the shape alone: what is added
// up in which order, and with it the result, does not depend on the number of threads.
struct Problem {
    spot_slot_attention size;
    spot_rows q, k, v;
    int64_t padded_slots, padded_width;
    int64_t pitch;  // from row to row of a buffer: an odd number of cache lines, so that rows do not compete for places
    int64_t chunk, chunks;

    int64_t joint() const { return size.heads * padded_slots; }  // logits of one token
    // of one item: U before the division by S or dq, [H, K, pitch], then S, [H, padded_slots]
    int64_t partial() const { return size.heads * size.slots * pitch + aligned(joint()); }
};

struct Forward : Problem {
    spot_rows updates, exact;
    float *attn, *logits, *sums;
};

struct Backward : Problem {
    spot_rows grad_updates;
    const float *grad_attn, *grad_logits;
    spot_rows exact;
    const float* sums;
    spot_rows dq, dk, dv;
};

// The arithmetic for one instruction set. An item leaves its sums in `partial`; when all items of a batch entry are done,
// finish adds them up, in order, and writes the result. `scratch` holds forward_scratch or backward_scratch floats.
struct Level {
    const char* name;
    int64_t (*forward_scratch)(const Problem&);
    void (*forward)(const Forward&, int64_t batch, int64_t chunk, float* partial, float* scratch);
    void (*finish_forward)(const Forward&, int64_t batch, float* partials);
    int64_t (*backward_scratch)(const Problem&);
    void (*backward)(const Backward&, int64_t batch, int64_t chunk, float* partial, float* scratch);
    void (*finish_backward)(const Backward&, int64_t batch, float* partials);
};

// Null where the compiler was not told to generate that instruction set (another processor or another compiler).
const Level* slot_attention_avx512bf16();
const Level* slot_attention_avx512();
const Level* slot_attention_avx2();
const Level* slot_attention_baseline();

}  // namespace spot

#endif
