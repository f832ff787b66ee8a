// Vectors of floats and small matrix products of them, for one instruction set: what slot_attention_kernel.h computes
// with. Like that it is compiled once for each instruction set, and for the same reason everything is in an unnamed
// namespace and nothing of the C++ library is used.

#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t kSteps = 32;

template <class V>
constexpr int64_t kLanes = sizeof(V) / sizeof(float);

template <class V>
struct Integers {
    using type = decltype(V{} < V{});  // a comparison of vectors is a vector of integers
};
template <>
struct Integers<float> {
    using type = int32_t;
};

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class V>
inline V load(const void* from) {
    V x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <class V>
inline void store(float* to, V x) {
    memcpy(to, &x, sizeof x);
}

template <class V>
inline V splat(float x) {
    return x - V{};
}

// Asks for kCount floats from memory to the second-level cache; the first level holds what is worked on. Rows of tokens
// are too short, and read too many at a time, for the processor to foresee them. Any address may be asked for.
template <int64_t kCount>
inline void prefetch(const float* from) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < kCount; i += 16) {
        __builtin_prefetch(from + i, 0, 2);
    }
#endif
}

template <class V>
inline V larger(V x, V y) {
    return x > y ? x : y;
}

// Lane i of the result is lane i ^ kStep of x.
template <int kStep, class V>
inline V exchanged(V x) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    if constexpr (kLanes<V> == 8) {
        return __builtin_shufflevector(x, x, 0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep,
                                       7 ^ kStep);
    } else if constexpr (kLanes<V> == 4) {
        return __builtin_shufflevector(x, x, 0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep);
    }
#endif
#endif
    V y = x;
    for (int i = 0; i < kLanes<V>; ++i) {
        y[i] = x[i ^ kStep];
    }
    return y;
}

// The sum, or the largest, of x's lanes, in every lane.
template <class V>
inline V sum_of(V x) {
    if constexpr (kLanes<V> == 8) {
        x = x + exchanged<4>(x);
    }
    if constexpr (kLanes<V> >= 4) {
        x = x + exchanged<2>(x);
        x = x + exchanged<1>(x);
    }
    return x;
}

template <class V>
inline V largest_of(V x) {
    if constexpr (kLanes<V> == 8) {
        x = larger(x, exchanged<4>(x));
    }
    if constexpr (kLanes<V> >= 4) {
        x = larger(x, exchanged<2>(x));
        x = larger(x, exchanged<1>(x));
    }
    return x;
}

// exp(x) for x <= 0 to about one unit in the last place, denormal results included; NaN stays NaN. x = n ln 2 + r with
// |r| <= ln 2 / 2, a polynomial for exp(r), and 2^n in two factors, since 2^n alone may be too small for a float.
template <class V>
inline V exponential(V x) {
    using I = typename Integers<V>::type;
    const V lowest = splat<V>(-104.0f);  // exp of it rounds to 0
    x = x < lowest ? lowest : x;
    const V shift = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const V shifted = x * 1.44269504f + shift;
    const V n = shifted - shift;
    V r = x - n * 0.693359375f;  // ln 2 in two parts, of which n times the first is exact
    r = r + n * 2.12194440e-4f;
    V p = r * 1.381422160193324e-3f + 8.36889911442995e-3f;
    p = p * r + 4.166840389370918e-2f;
    p = p * r + 0.1666651964187622f;
    p = p * r + 0.4999999403953552f;
    p = p * (r * r) + r + 1.0f;
    const I exponent = bits<I>(shifted) - bits<I>(shift);
    const I half = exponent >> 1;
    return p * bits<V>((half + 127) << 23) * bits<V>((exponent - half + 127) << 23);
}

// How a product reads its left operand.
enum Operand { kByRows, kTransposed, kPairs };

// The float at `from`, or for kPairs its bits, in every lane.
template <class V, Operand kA>
inline V spread(const float* from) {
    if constexpr (kA == kPairs) {
        return bits<V>(typename Integers<V>::type{} + load<int32_t>(from));
    } else {
        return splat<V>(*from);
    }
}

template <Operand kA, class V>
inline V multiply_add(V x, V y, V sum) {
    if constexpr (kA == kPairs) {
        return dot_pairs(x, y, sum);
    } else {
        return x * y + sum;
    }
}

// C[i][j] = start[i][j] + sum over p of A[i][p] B[p][j] for kRows rows and kColumns vectors of C, kept in registers.
// A[i][p] is a[i * a_stride + p], or a[p * a_stride + i] where A is transposed. No start: zero; start_stride 0: one row.
// With kPairs a float of A or B stands for two bfloat16 numbers, and a product for the sum of their two.
// Sums of at most kSteps products are added up, not one long sum: its rounding errors would grow with its length.
template <class V, int kRows, int kColumns, Operand kA>
inline void tile(int64_t steps, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const float* start,
                 int64_t start_stride, float* c, int64_t c_stride, int64_t ahead) {
    int64_t p = 0;
    do {
        V sum[kRows][kColumns]{};
        const int64_t end = steps - p < kSteps ? steps : p + kSteps;
        if (ahead && kA == kTransposed) {
            for (int64_t i = p; i < end; ++i) {
                prefetch<kColumns * kLanes<V>>(b + i * b_stride + ahead);
            }
        } else if (ahead) {
            for (int i = 0; i < kRows; ++i) {
                prefetch<kSteps>(a + i * a_stride + p + ahead);
            }
        }
        for (; p < end; ++p) {
            V row[kColumns];
            for (int j = 0; j < kColumns; ++j) {
                row[j] = load<V>(b + p * b_stride + j * kLanes<V>);
            }
            for (int i = 0; i < kRows; ++i) {
                const V factor = spread<V, kA>(a + (kA == kTransposed ? p * a_stride + i : i * a_stride + p));
                for (int j = 0; j < kColumns; ++j) {
                    sum[i][j] = multiply_add<kA>(factor, row[j], sum[i][j]);
                }
            }
        }
        if (start) {
            for (int i = 0; i < kRows; ++i) {
                for (int j = 0; j < kColumns; ++j) {
                    const V before = load<V>(start + i * start_stride + j * kLanes<V>);
                    store(c + i * c_stride + j * kLanes<V>, before + sum[i][j]);
                }
            }
        } else {
            for (int i = 0; i < kRows; ++i) {
                for (int j = 0; j < kColumns; ++j) {
                    store(c + i * c_stride + j * kLanes<V>, sum[i][j]);
                }
            }
        }
        start = c;
        start_stride = c_stride;
    } while (p < steps);
}

template <class V, int kRows, int kColumns, Operand kA>
inline void tile_of(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                    const float* start, int64_t start_stride, float* c, int64_t c_stride, int64_t ahead) {
    if (rows == kRows) {
        tile<V, kRows, kColumns, kA>(steps, a, a_stride, b, b_stride, start, start_stride, c, c_stride, ahead);
    } else if constexpr (kRows > 1) {
        tile_of<V, kRows - 1, kColumns, kA>(rows, steps, a, a_stride, b, b_stride, start, start_stride, c,
                                                     c_stride, ahead);
    }
}

// As tile, for any number of rows.
template <class V, int kColumns, Operand kA>
void strip(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
           const float* start, int64_t start_stride, float* c, int64_t c_stride, int64_t ahead) {
    // as many sums as there are registers for; A by rows also needs an address for each of them
    constexpr int kMost = kA == kTransposed ? kTransposedRows : kRowMajorRows;
    for (int64_t tiles = (rows + kMost - 1) / kMost, i = 0; tiles > 0; --tiles) {
        const int64_t some = (rows - i + tiles - 1) / tiles;
        tile_of<V, kMost, kColumns, kA>(some, steps, a + i * (kA == kTransposed ? 1 : a_stride), a_stride, b,
                                                 b_stride, start ? start + i * start_stride : nullptr, start_stride,
                                                 c + i * c_stride, c_stride, kA == kTransposed && i ? 0 : ahead);
        i += some;
    }
}

// As strip, for any number of columns that is a multiple of V's lanes. B is packed or has rows at b_stride.
template <class V, Operand kA, bool kPacked>
void product(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride, int64_t ahead) {
    constexpr int64_t L = kLanes<V>;
    for (int64_t j = 0; j < columns;) {
        const bool two = columns - j >= 2 * L;
        const int64_t lanes = two ? 2 * L : L;
        const float* panel = b + (kPacked ? j * steps : j);
        (two ? strip<V, 2, kA> : strip<V, 1, kA>)(rows, steps, a, a_stride, panel,
                                                                    kPacked ? lanes : b_stride,
                                                                    start ? start + j : nullptr, start_stride, c + j,
                                                                    c_stride, kA == kTransposed || !j ? ahead : 0);
        j += lanes;
    }
}

}  // namespace
