// Entry points of the slot-attention step: sizes, the instruction set, work items and threads.

#include "sizes.h"
#include "slot_attention.h"
#include "team.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <new>
#include <vector>

namespace {

using spot::in_team;
using spot::Level;
using spot::Problem;

// A thread takes some 50 us to start and end, one of a team some 10 us to wake: each has to have several times that to
// do, at some 10 products a ns.
constexpr double kProductsPerThread = 4e6;
constexpr double kProductsPerMember = 1e6;
// At least so many work items, as far as there are chunks of tokens that are worth a partial result.
constexpr int64_t kItems = 64;
constexpr int64_t kSmallestChunk = 1024;

// What the processor has and the operating system saves.
bool processor_has(int32_t level) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    switch (level) {
        case SPOT_LEVEL_AVX2:
            return avx2;
        case SPOT_LEVEL_AVX512:
            return avx512;
        case SPOT_LEVEL_AVX512BF16:
#if defined(__clang__) || __GNUC__ >= 11
            return avx512 && __builtin_cpu_supports("avx512bf16");
#else
            return false;
#endif
    }
#endif
    return level == SPOT_LEVEL_BASELINE;
}

// Null for a level that this build or this processor does not have.
const Level* level_of(int32_t level) {
    if (level == SPOT_LEVEL_BEST) {
        const Level* best = nullptr;
        for (int32_t tried = SPOT_LEVEL_AVX512BF16; !best; --tried) {
            best = level_of(tried);
        }
        return best;
    }
    if (!processor_has(level)) {
        return nullptr;
    }
    return level == SPOT_LEVEL_AVX512BF16 ? spot::slot_attention_avx512bf16()
           : level == SPOT_LEVEL_AVX512   ? spot::slot_attention_avx512()
           : level == SPOT_LEVEL_AVX2     ? spot::slot_attention_avx2()
                                          : spot::slot_attention_baseline();
}

struct Buffer {
    explicit Buffer(int64_t floats)
        : data(static_cast<float*>(::operator new(static_cast<std::size_t>(floats) * sizeof(float), kAlign))) {}
    ~Buffer() { ::operator delete(data, kAlign); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    static constexpr std::align_val_t kAlign{spot::kAlignment};
    float* const data;
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Whether there are rows [batch, heads, count, width] at an array. Strides that nobody walks along, and which may be
// anything (along an axis of size 1; of an array without elements), become 0.
bool usable(spot_rows& rows, const spot_slot_attention& size, int64_t count) {
    const int64_t elements = size.heads * count * size.width;
    rows.batch_stride = elements && size.batch > 1 ? rows.batch_stride : 0;
    rows.head_stride = elements && size.heads > 1 ? rows.head_stride : 0;
    rows.row_stride = elements && count > 1 ? rows.row_stride : 0;
    return spot::there(rows.data, elements) && rows.batch_stride >= 0 && rows.head_stride >= 0 &&
           rows.row_stride >= 0;
}

// False for a call that cannot be; of an empty batch nothing more is asked.
bool plan(Problem& p) {
    const spot_slot_attention& s = p.size;
    if (s.batch < 0 || s.heads < 0 || s.tokens < 0 || s.slots < 0 || s.width < 0 ||
        (s.dtype != SPOT_FLOAT32 && s.dtype != SPOT_BFLOAT16)) {
        return false;
    }
    if (s.batch == 0) {
        return true;
    }
    if (!spot::countable({s.batch, s.heads, s.tokens, s.slots, s.width}) || !usable(p.q, s, s.slots) ||
        !usable(p.k, s, s.tokens) || !usable(p.v, s, s.tokens)) {
        return false;
    }
    p.padded_slots = round_up(s.slots, spot::kSlotLanes);
    p.padded_width = round_up(s.width, spot::kWidthLanes);
    p.pitch = p.padded_width | spot::kWidthLanes;
    const int64_t most = std::max<int64_t>(1, s.tokens / kSmallestChunk);
    const int64_t wanted = (kItems + s.batch - 1) / s.batch;
    p.chunks = std::min(most, wanted);
    p.chunk = round_up((s.tokens + p.chunks - 1) / p.chunks, spot::kBlock);
    return true;
}

// Runs item(batch, chunk, partial, scratch) for all work items and finish(batch, partials) for all batch entries.
template <class Item, class Finish>
void run(const Problem& p, int64_t scratch, double products, Item item, Finish finish) {
    const int64_t items = p.size.batch * p.chunks, partial = p.partial();
    const double worth = std::min(static_cast<double>(p.size.threads),
                                  products / (p.size.team ? kProductsPerMember : kProductsPerThread));
    const int64_t threads = std::max<int64_t>(1, std::min(items, static_cast<int64_t>(worth)));
    // an item that is the whole batch entry is finished where it was computed
    const bool whole = p.chunks == 1;
    const Buffer partials(whole ? 0 : items * partial);
    const int64_t memory = scratch + (whole ? partial : 0);
    const Buffer memories(threads * memory);
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> workers{0};
    const auto work = [&]() noexcept {
        float* own = memories.data + workers.fetch_add(1, std::memory_order_relaxed) * memory;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            float* sums = whole ? own + scratch : partials.data + i * partial;
            item(i / p.chunks, i % p.chunks, sums, own);
            if (whole) {
                finish(i, sums);
            }
        }
    };
    in_team(p.size.team, threads, work);
    for (int64_t b = 0; b < p.size.batch && !whole; ++b) {
        finish(b, partials.data + b * p.chunks * partial);
    }
}

double products_per_pass(const spot_slot_attention& s) {
    return static_cast<double>(s.batch) * s.heads * s.tokens * s.slots * s.width;
}

}  // namespace

const char* spot_slot_attention_level(int32_t level) {
    const Level* found = level_of(level);
    return found ? found->name : nullptr;
}

int spot_slot_attention_forward(const spot_slot_attention* size, const spot_rows* q, const spot_rows* k,
                                const spot_rows* v, const spot_rows* updates, const spot_rows* exact, float* attn,
                                float* logits, float* sums) {
    spot::Forward p{{*size, *q, *k, *v, 0, 0, 0, 0, 0}, *updates, *exact, attn, logits, sums};
    if (!plan(p)) {
        return SPOT_BAD_SIZE;
    }
    if (size->batch == 0) {
        return SPOT_OK;
    }
    if (!usable(p.updates, *size, size->slots) || !usable(p.exact, *size, size->slots) ||
        !spot::there(sums, size->heads * size->slots)) {
        return SPOT_BAD_SIZE;
    }
    const Level* level = level_of(size->level);
    if (!level) {
        return SPOT_BAD_LEVEL;
    }
    try {
        run(p, level->forward_scratch(p), 2 * products_per_pass(*size),
            [&](int64_t b, int64_t chunk, float* partial, float* scratch) { level->forward(p, b, chunk, partial, scratch); },
            [&](int64_t b, float* partials) { level->finish_forward(p, b, partials); });
    } catch (const std::exception&) {
        return SPOT_NO_MEMORY;
    }
    return SPOT_OK;
}

int spot_slot_attention_backward(const spot_slot_attention* size, const spot_rows* grad_updates, const float* grad_attn,
                                 const float* grad_logits, const spot_rows* q, const spot_rows* k, const spot_rows* v,
                                 const spot_rows* exact, const float* sums, const spot_rows* dq, const spot_rows* dk,
                                 const spot_rows* dv) {
    spot::Backward p{{*size, *q, *k, *v, 0, 0, 0, 0, 0},
                     grad_updates ? *grad_updates : spot_rows{},
                     grad_attn,
                     grad_logits,
                     *exact,
                     sums,
                     *dq,
                     *dk,
                     *dv};
    if (!plan(p)) {
        return SPOT_BAD_SIZE;
    }
    if (size->batch == 0) {
        return SPOT_OK;
    }
    if (!usable(p.exact, *size, size->slots) || !usable(p.dq, *size, size->slots) ||
        !usable(p.dk, *size, size->tokens) || !usable(p.dv, *size, size->tokens) ||
        (grad_updates && !usable(p.grad_updates, *size, size->slots)) ||
        !spot::there(sums, size->heads * size->slots)) {
        return SPOT_BAD_SIZE;
    }
    const Level* level = level_of(size->level);
    if (!level) {
        return SPOT_BAD_LEVEL;
    }
    try {
        run(p, level->backward_scratch(p), 5 * products_per_pass(*size),
            [&](int64_t b, int64_t chunk, float* partial, float* scratch) { level->backward(p, b, chunk, partial, scratch); },
            [&](int64_t b, float* partials) { level->finish_backward(p, b, partials); });
    } catch (const std::exception&) {
        return SPOT_NO_MEMORY;
    }
    return SPOT_OK;
}
