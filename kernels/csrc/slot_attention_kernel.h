// The arithmetic of the slot-attention step for one instruction set. Included by slot_attention_<level>.cpp, which is
// compiled with that instruction set switched on and defines Wide and Lane, its vectors along the width and the slots.
//
// Everything is in an unnamed namespace and nothing of the C++ library is used: the linker may not find a function here
// that it could take for the one that code for any processor calls.
//
// Tokens go by in blocks of kBlock; a block's rows of k and v come from memory once. Every product is a small matrix
// product C = A B with vectors along C's last axis: logits [tokens, slots] with q transposed once per item, updates and
// dq [slots, width], dk and dv [tokens, width].

#include <stdint.h>
#include <string.h>

#include "slot_attention.h"
#include "slot_attention_products.h"

namespace {

using spot::aligned;
using spot::Backward;
using spot::Forward;
using spot::kBlock;
using spot::Problem;

// rows [slots, width] at `stride`, transposed to the panels that product reads: [panel][width][lanes], zero beyond
// `slots`.
void pack(const float* rows, int64_t stride, int64_t slots, int64_t padded_slots, int64_t width, float* packed) {
    constexpr int64_t L = kLanes<Lane>;
    for (int64_t k = 0; k < padded_slots;) {
        const int64_t lanes = padded_slots - k >= 2 * L ? 2 * L : L;
        for (int64_t lane = 0; lane < lanes; ++lane, ++k) {
            for (int64_t i = 0; i < width; ++i) {
                packed[i * lanes + lane] = k < slots ? load<float>(rows + k * stride + i) : 0.0f;
            }
        }
        packed += lanes * width;
    }
}

void zero(float* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// memcpy is not to be given the null pointer of an array without elements.
void copy(const float* from, int64_t count, float* to) {
    if (count) {
        memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    }
}

void widen(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = bits<float>(static_cast<uint32_t>(from[i]) << 16);
    }
}

// To the nearest bfloat16, ties to even; NaN to a quiet NaN.
void narrow(const float* from, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t x = bits<uint32_t>(from[i]);
        const uint32_t rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
        to[i] = static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

// Rows of one batch entry and head as float32: where they lie or, converted and padded with zeros, in a buffer.
struct Rows {
    const float* data;
    int64_t stride;
    int64_t ahead;
};

int64_t offset(const spot_rows& rows, int64_t batch, int64_t head, int64_t row) {
    return batch * rows.batch_stride + head * rows.head_stride + row * rows.row_stride;
}

// Whether a product may read (or write) whole vectors of the rows in place.
bool in_place(const Problem& p) { return p.size.dtype == SPOT_FLOAT32 && p.size.width == p.padded_width; }

Rows copied(const Problem& p, const spot_rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
            float* buffer) {
    const int64_t width = p.size.width;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = offset(rows, batch, head, first + i);
        float* to = buffer + i * p.pitch;
        if (p.size.dtype == SPOT_FLOAT32) {
            copy(static_cast<const float*>(rows.data) + from, width, to);
        } else {
            widen(static_cast<const uint16_t*>(rows.data) + from, width, to);
        }
        zero(to + width, p.padded_width - width);
    }
    return {buffer, p.pitch, 0};
}

Rows rows_of(const Problem& p, const spot_rows& rows, int64_t batch, int64_t head, int64_t first, int64_t count,
             float* buffer) {
    if (in_place(p)) {
        return {static_cast<const float*>(rows.data) + offset(rows, batch, head, first), rows.row_stride, kBlock * rows.row_stride};
    }
    return copied(p, rows, batch, head, first, count, buffer);
}

void write_row(const Problem& p, const spot_rows& rows, int64_t batch, int64_t head, int64_t row, const float* from) {
    const int64_t to = offset(rows, batch, head, row);
    if (p.size.dtype == SPOT_FLOAT32) {
        copy(from, p.size.width, static_cast<float*>(rows.data) + to);
    } else {
        narrow(from, p.size.width, static_cast<uint16_t*>(rows.data) + to);
    }
}

// What both directions do for an item: its buffers, q in both layouts, logits and their softmax of a block of tokens.
struct Attention {
    const Problem& p;
    const int64_t batch, first, end;  // tokens first ... end - 1
    const bool q_pairs;
    float* const q_rows;              // [H, K, pitch]
    float* const packed_q;            // [H] panels
    float* const bias;                // [padded slots]: 0, -infinity beyond K
    float* const k_rows;              // [H, kBlock, pitch], where they cannot be read in place
    float* const v_rows;              // the same
    float* const a;                   // [kBlock, H, padded slots]: logits, then attention

    static int64_t scratch(const Problem& p) {
        return p.size.heads * (p.size.slots + 2 * kBlock) * p.pitch + aligned(p.joint() * p.size.width) +
               aligned(p.padded_slots) + kBlock * p.joint();
    }

    Attention(const Problem& problem, int64_t batch_entry, int64_t chunk, float* memory)
        : p(problem), batch(batch_entry), first(chunk * p.chunk),
          end(first + p.chunk < p.size.tokens ? first + p.chunk : p.size.tokens),
          q_pairs(pairs(p.q, p.k)), q_rows(memory),
          packed_q(q_rows + p.size.heads * p.size.slots * p.pitch), bias(packed_q + aligned(p.joint() * p.size.width)),
          k_rows(bias + aligned(p.padded_slots)), v_rows(k_rows + p.size.heads * kBlock * p.pitch),
          a(v_rows + p.size.heads * kBlock * p.pitch) {
        for (int64_t k = 0; k < p.padded_slots; ++k) {
            bias[k] = k < p.size.slots ? 0.0f : bits<float>(0xff800000u);
        }
        slot_rows(p.q, q_pairs, q_rows, packed_q);
    }

    // Whether the product of these rows of slots and of tokens can work on pairs of bfloat16 numbers where they lie.
    bool pairs(const spot_rows& slots, const spot_rows& tokens) const {
        return kHasPairs && p.size.dtype == SPOT_BFLOAT16 && p.size.width % 2 == 0 && slots.row_stride % 2 == 0 &&
               tokens.row_stride % 2 == 0;
    }

    // Rows [H, K, width] as float32, and packed for a product with rows of tokens.
    void slot_rows(const spot_rows& from, bool as_pairs, float* rows, float* packed) const {
        for (int64_t head = 0; head < p.size.heads; ++head, packed += p.padded_slots * p.size.width) {
            float* of_head = rows + head * p.size.slots * p.pitch;
            copied(p, from, batch, head, 0, p.size.slots, of_head);
            if (as_pairs) {
                pack(words(from, head, 0), from.row_stride / 2, p.size.slots, p.padded_slots, p.size.width / 2, packed);
            } else {
                pack(of_head, p.pitch, p.size.slots, p.padded_slots, p.size.width, packed);
            }
        }
    }

    // Pairs of bfloat16 numbers, to be read by load only.
    const float* words(const spot_rows& rows, int64_t head, int64_t row) const {
        return reinterpret_cast<const float*>(static_cast<const uint16_t*>(rows.data) + offset(rows, batch, head, row));
    }

    Rows tokens(const spot_rows& from, int64_t head, int64_t token, int64_t count, float* buffer) const {
        return rows_of(p, from, batch, head, token, count, buffer + head * kBlock * p.pitch);
    }

    // `to` [count, padded slots] of a head = its rows of tokens times its packed rows of slots, plus `start` where given.
    template <class V = Lane>
    void times_slots(const spot_rows& from, int64_t head, int64_t token, int64_t count, float* buffer,
                     const float* packed, bool as_pairs, const float* start, float* to) const {
        packed += head * p.padded_slots * p.size.width;
        to += head * p.padded_slots;
        if constexpr (kHasPairs && kLanes<V> > 0) {
            if (as_pairs) {
                const int64_t stride = from.row_stride / 2;
                product<V, kPairs, true>(count, p.padded_slots, p.size.width / 2, words(from, head, token), stride,
                                         packed, 0, start, 0, to, p.joint(), kBlock * stride);
                return;
            }
        }
        const Rows rows = tokens(from, head, token, count, buffer);
        product<V, kByRows, true>(count, p.padded_slots, p.size.width, rows.data, rows.stride, packed, 0, start, 0, to,
                                  p.joint(), rows.ahead);
    }

    // Adds weights [count, K] of a head, transposed, times rows [count, pitch] to `sums` [K, pitch].
    void add_over_tokens(const float* weights, Rows rows, int64_t head, int64_t count, float* sums) const {
        float* to = sums + head * p.size.slots * p.pitch;
        product<Wide, kTransposed, false>(p.size.slots, p.padded_width, count, weights + head * p.padded_slots, p.joint(),
                                   rows.data, rows.stride, to, p.pitch, to, p.pitch, rows.ahead);
    }

    // a = softmax of a over heads × slots, for each token. In three sweeps, so that within each of them the processor
    // can work on many tokens at once.
    void softmax(int64_t count) const {
        const int64_t joint = p.joint(), size = count * joint;
        for (float* row = a; row < a + size; row += joint) {
            Lane most = load<Lane>(row);
            for (int64_t j = kLanes<Lane>; j < joint; j += kLanes<Lane>) {
                most = larger(most, load<Lane>(row + j));
            }
            most = largest_of(most);
            for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
                store(row + j, load<Lane>(row + j) - most);
            }
        }
        for (int64_t i = 0; i < size; i += kLanes<Lane>) {
            store(a + i, exponential(load<Lane>(a + i)));
        }
        for (float* row = a; row < a + size; row += joint) {
            Lane total{};
            for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
                total = total + load<Lane>(row + j);
            }
            total = sum_of(total);
            for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
                store(row + j, load<Lane>(row + j) / total);
            }
        }
    }
};

int64_t forward_scratch(const Problem& p) { return Attention::scratch(p); }

void write_logits(const Forward& p, const Attention& item, int64_t token, int64_t count) {
    const int64_t slots = p.size.slots;
    for (int64_t head = 0; head < p.size.heads; ++head) {
        float* to = p.logits + ((item.batch * p.size.heads + head) * p.size.tokens + token) * slots;
        for (int64_t t = 0; t < count; ++t, to += slots) {
            copy(item.a + t * p.joint() + head * p.padded_slots, slots, to);
        }
    }
}

void write_attn(const Forward& p, const Attention& item, int64_t token, int64_t count) {
    const int64_t slots = p.size.slots;
    float* to = p.attn + (item.batch * p.size.tokens + token) * slots;
    for (int64_t t = 0; t < count; ++t, to += slots) {
        const float* from = item.a + t * p.joint();
        copy(from, slots, to);
        for (int64_t head = 1; head < p.size.heads; ++head) {
            for (int64_t k = 0; k < slots; ++k) {
                to[k] += from[head * p.padded_slots + k];
            }
        }
    }
}

void forward(const Forward& p, int64_t batch, int64_t chunk, float* partial, float* scratch) {
    const Attention item(p, batch, chunk, scratch);
    const int64_t joint = p.joint();
    float* sums = partial + p.size.heads * p.size.slots * p.pitch;
    const Lane eps = splat<Lane>(p.size.eps);
    zero(partial, p.partial());
    for (int64_t token = item.first; token < item.end; token += kBlock) {
        const int64_t count = item.end - token < kBlock ? item.end - token : kBlock;
        for (int64_t head = 0; head < p.size.heads; ++head) {
            item.times_slots(p.k, head, token, count, item.k_rows, item.packed_q, item.q_pairs, item.bias, item.a);
        }
        if (p.logits) {
            write_logits(p, item, token, count);
        }
        item.softmax(count);
        if (p.attn) {
            write_attn(p, item, token, count);
        }
        for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
            Lane sum{};
            for (int64_t t = 0; t < count; ++t) {
                const Lane weight = load<Lane>(item.a + t * joint + j) + eps;
                store(item.a + t * joint + j, weight);
                sum = sum + weight;
            }
            store(sums + j, load<Lane>(sums + j) + sum);
        }
        for (int64_t head = 0; head < p.size.heads; ++head) {
            item.add_over_tokens(item.a, item.tokens(p.v, head, token, count, item.v_rows), head, count, partial);
        }
    }
}

// Adds the partial results of a batch entry to its first one.
void reduce(const Problem& p, float* partials) {
    const int64_t size = p.partial();
    for (int64_t chunk = 1; chunk < p.chunks; ++chunk) {
        for (int64_t i = 0; i < size; ++i) {
            partials[i] += partials[chunk * size + i];
        }
    }
}

void finish_forward(const Forward& p, int64_t batch, float* partials) {
    reduce(p, partials);
    const int64_t slots = p.size.slots;
    const float* sums = partials + p.size.heads * slots * p.pitch;
    for (int64_t head = 0; head < p.size.heads; ++head) {
        for (int64_t k = 0; k < slots; ++k) {
            float* row = partials + (head * slots + k) * p.pitch;
            const float sum = sums[head * p.padded_slots + k];
            for (int64_t i = 0; i < p.size.width; ++i) {
                row[i] /= sum;
            }
            p.sums[(batch * p.size.heads + head) * slots + k] = sum;
            copy(row, p.size.width, static_cast<float*>(p.exact.data) + offset(p.exact, batch, head, k));
            write_row(p, p.updates, batch, head, k, row);
        }
    }
}

int64_t backward_scratch(const Problem& p) {
    return Attention::scratch(p) + p.size.heads * p.size.slots * p.pitch + aligned(p.joint() * p.size.width) +
           2 * aligned(p.joint()) + kBlock * (p.joint() + p.pitch);
}

// For tokens token ... token + count - 1: from attention in item.a and v·dU in g to the gradient of the logits in g and
// the weights w = (a + eps) / S in item.a. `level` is U·dU and `per_sum` 1 / S, both 0 beyond K.
void logit_gradients(const Backward& p, const Attention& item, int64_t token, int64_t count, const float* level,
                     const float* per_sum, float* g) {
    const int64_t joint = p.joint(), slots = p.size.slots;
    const Lane eps = splat<Lane>(p.size.eps);
    for (int64_t t = 0; t < count; ++t) {
        float* a = item.a + t * joint;
        float* row = g + t * joint;
        for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
            store(row + j, (load<Lane>(row + j) - load<Lane>(level + j)) * load<Lane>(per_sum + j));
        }
        if (p.grad_attn) {
            const float* from = p.grad_attn + (item.batch * p.size.tokens + token + t) * slots;
            for (int64_t head = 0; head < p.size.heads; ++head) {
                for (int64_t k = 0; k < slots; ++k) {
                    row[head * p.padded_slots + k] += from[k];
                }
            }
        }
        Lane total{};
        for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
            total = total + load<Lane>(a + j) * load<Lane>(row + j);
        }
        total = sum_of(total);
        for (int64_t j = 0; j < joint; j += kLanes<Lane>) {
            const Lane attention = load<Lane>(a + j);
            store(row + j, attention * (load<Lane>(row + j) - total));
            store(a + j, (attention + eps) * load<Lane>(per_sum + j));
        }
        if (p.grad_logits) {
            for (int64_t head = 0; head < p.size.heads; ++head) {
                const float* from =
                    p.grad_logits + ((item.batch * p.size.heads + head) * p.size.tokens + token + t) * slots;
                for (int64_t k = 0; k < slots; ++k) {
                    row[head * p.padded_slots + k] += from[k];
                }
            }
        }
    }
}

// rows [count, width] of `to` = weights [count, K] of a head times slot rows [K, pitch].
void write_tokens(const Attention& item, const float* weights, const float* slot_rows, int64_t head, int64_t token,
                  int64_t count, const spot_rows& to, float* buffer) {
    const Problem& p = item.p;
    const bool direct = in_place(p);
    float* c = direct ? static_cast<float*>(to.data) + offset(to, item.batch, head, token) : buffer;
    product<Wide, kByRows, false>(count, p.padded_width, p.size.slots, weights + head * p.padded_slots, p.joint(),
                                slot_rows + head * p.size.slots * p.pitch, p.pitch, nullptr, 0, c,
                                direct ? to.row_stride : p.pitch, 0);
    for (int64_t t = 0; t < count && !direct; ++t) {
        write_row(p, to, item.batch, head, token + t, buffer + t * p.pitch);
    }
}

void backward(const Backward& p, int64_t batch, int64_t chunk, float* partial, float* scratch) {
    const Attention item(p, batch, chunk, scratch);
    const int64_t slots = p.size.slots, joint = p.joint();
    float* du_rows = scratch + Attention::scratch(p);
    float* packed_du = du_rows + p.size.heads * slots * p.pitch;
    float* level = packed_du + aligned(joint * p.size.width);
    float* per_sum = level + aligned(joint);
    float* g = per_sum + aligned(joint);
    float* out = g + kBlock * joint;
    const bool du_pairs = item.pairs(p.grad_updates, p.v);
    zero(partial, p.partial());
    zero(level, 2 * aligned(joint));
    if (p.grad_updates.data) {
        item.slot_rows(p.grad_updates, du_pairs, du_rows, packed_du);
    } else {
        zero(du_rows, p.size.heads * slots * p.pitch);
        zero(g, kBlock * joint);
    }
    for (int64_t head = 0; head < p.size.heads; ++head) {
        for (int64_t k = 0; k < slots; ++k) {
            const float* du = du_rows + (head * slots + k) * p.pitch;
            const float* u = static_cast<const float*>(p.exact.data) + offset(p.exact, batch, head, k);
            // several sums at a time: one alone would wait for itself
            double dot[8]{};
            int64_t i = 0;
            for (; i + 8 <= p.size.width; i += 8) {
                for (int part = 0; part < 8; ++part) {
                    dot[part] += static_cast<double>(du[i + part]) * static_cast<double>(u[i + part]);
                }
            }
            for (; i < p.size.width; ++i) {
                dot[0] += static_cast<double>(du[i]) * static_cast<double>(u[i]);
            }
            level[head * p.padded_slots + k] = static_cast<float>(((dot[0] + dot[1]) + (dot[2] + dot[3])) +
                                                                  ((dot[4] + dot[5]) + (dot[6] + dot[7])));
            per_sum[head * p.padded_slots + k] = 1.0f / p.sums[(batch * p.size.heads + head) * slots + k];
        }
    }
    for (int64_t token = item.first; token < item.end; token += kBlock) {
        const int64_t count = item.end - token < kBlock ? item.end - token : kBlock;
        for (int64_t head = 0; head < p.size.heads; ++head) {
            item.times_slots(p.k, head, token, count, item.k_rows, item.packed_q, item.q_pairs, item.bias, item.a);
            if (p.grad_updates.data) {
                item.times_slots(p.v, head, token, count, item.v_rows, packed_du, du_pairs, nullptr, g);
            }
        }
        item.softmax(count);
        logit_gradients(p, item, token, count, level, per_sum, g);
        for (int64_t head = 0; head < p.size.heads; ++head) {
            // k as float32 is there already, unless the logits were computed from pairs
            const Rows k = in_place(p) || item.q_pairs ? item.tokens(p.k, head, token, count, item.k_rows)
                                                       : Rows{item.k_rows + head * kBlock * p.pitch, p.pitch, 0};
            item.add_over_tokens(g, k, head, count, partial);
            write_tokens(item, g, item.q_rows, head, token, count, p.dk, out);
            write_tokens(item, item.a, du_rows, head, token, count, p.dv, out);
        }
        if (!p.grad_updates.data) {
            zero(g, kBlock * joint);
        }
    }
}

void finish_backward(const Backward& p, int64_t batch, float* partials) {
    reduce(p, partials);
    for (int64_t head = 0; head < p.size.heads; ++head) {
        for (int64_t k = 0; k < p.size.slots; ++k) {
            write_row(p, p.dq, batch, head, k, partials + (head * p.size.slots + k) * p.pitch);
        }
    }
}

constexpr spot::Level kLevel = {SPOT_LEVEL,       forward_scratch, forward,        finish_forward,
                                backward_scratch, backward,        finish_backward};

}  // namespace
