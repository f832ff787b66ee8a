// Label maps of soft masks: bilinear resize, corners not aligned, and the first largest mask of each pixel, in one pass.
// Each row of the grid is resized along x once; a row of the label map then mixes two of them mask by mask, and keeps the
// largest value and its mask. Full-size maps of floats are never written.
//
// The sums equal PyTorch's to the last bit, so that near-ties are decided alike: v = l0 * w0 + l1 * w1 along x, then along
// y. PyTorch's build for processors with FMA fuses l0 * w0 with the addition, and the source coordinate likewise.

#include "sizes.h"
#include "spot_native.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <vector>

#if defined(__GNUC__)
#define SPOT_INLINE inline __attribute__((always_inline))
#else
#define SPOT_INLINE inline
#endif
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define SPOT_X86 1
#endif

namespace {

constexpr double kMixesPerNs = 1.5;  // of a core, roughly: decides how many threads pay
constexpr int64_t kBlock = 64;  // pixels of a row whose largest values and labels stay in registers and the first cache

// The two grid coordinates that a coordinate of the label map lies between, and their weights.
struct Mix {
    int64_t low, high;
    float of_low, of_high;
};

template <bool fused>
SPOT_INLINE float mix(float low, float of_low, float high, float of_high) {
    return fused ? std::fma(low, of_low, high * of_high) : low * of_low + high * of_high;
}

std::vector<Mix> mixes(int64_t grid, int64_t size, bool fused) {
    std::vector<Mix> all(size);
    const float scale = static_cast<float>(grid) / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) {
        const float middle = static_cast<float>(i) + 0.5f;
        const float source = std::max(0.0f, fused ? std::fma(scale, middle, -0.5f) : scale * middle - 0.5f);
        const int64_t low = std::min(static_cast<int64_t>(source), grid - 1);
        const float of_high = std::min(std::max(source - static_cast<float>(low), 0.0f), 1.0f);
        all[i] = {low, std::min(low + 1, grid - 1), 1.0f - of_high, of_high};
    }
    return all;
}

// masks [grid, grid, slots] → rows [grid, slots, size] → labels [size, size]
template <bool fused>
SPOT_INLINE void label_image(const float* masks, const Mix* at, int64_t grid, int64_t slots, int64_t size, float* rows,
                             uint8_t* labels) {
    // along x, with x innermost: contiguous stores, and the gather of row[...] stays within one row of the grid
    for (int64_t y = 0; y < grid; ++y) {
        const float* row = masks + y * grid * slots;
        for (int64_t slot = 0; slot < slots; ++slot) {
            float* wide = rows + (y * slots + slot) * size;
            for (int64_t x = 0; x < size; ++x) {
                wide[x] = mix<fused>(row[at[x].low * slots + slot], at[x].of_low, row[at[x].high * slots + slot],
                                     at[x].of_high);
            }
        }
    }
    // along y, slot by slot over a block of pixels: two contiguous loads and a branch-free maximum, which vectorise
    float best[kBlock];
    int32_t winner[kBlock];
    for (int64_t y = 0; y < size; ++y) {
        const Mix m = at[y];
        for (int64_t start = 0; start < size; start += kBlock) {
            const float* low = rows + m.low * slots * size + start;
            const float* high = rows + m.high * slots * size + start;
            const int64_t width = std::min(kBlock, size - start);
            for (int64_t x = 0; x < width; ++x) {
                best[x] = mix<fused>(low[x], m.of_low, high[x], m.of_high);
                winner[x] = 0;
            }
            for (int64_t slot = 1; slot < slots; ++slot) {
                const float* l = low + slot * size;
                const float* h = high + slot * size;
                for (int64_t x = 0; x < width; ++x) {
                    const float value = mix<fused>(l[x], m.of_low, h[x], m.of_high);
                    // strictly larger: the first of equal masks stays
                    const bool larger = value > best[x];
                    best[x] = larger ? value : best[x];
                    winner[x] = larger ? static_cast<int32_t>(slot) : winner[x];
                }
            }
            uint8_t* out = labels + y * size + start;
            for (int64_t x = 0; x < width; ++x) {
                out[x] = static_cast<uint8_t>(winner[x]);
            }
        }
    }
}

using Image = void (*)(const float*, const Mix*, int64_t, int64_t, int64_t, float*, uint8_t*);

void plain_image(const float* masks, const Mix* at, int64_t grid, int64_t slots, int64_t size, float* rows,
                 uint8_t* labels) {
    label_image<false>(masks, at, grid, slots, size, rows, labels);
}

void fused_image(const float* masks, const Mix* at, int64_t grid, int64_t slots, int64_t size, float* rows,
                 uint8_t* labels) {
    label_image<true>(masks, at, grid, slots, size, rows, labels);
}

#if SPOT_X86
// The rest of the library runs on any x86 processor; this clone is inlined with AVX2 and FMA enabled.
__attribute__((target("avx2,fma"))) void avx2_image(const float* masks, const Mix* at, int64_t grid, int64_t slots,
                                                    int64_t size, float* rows, uint8_t* labels) {
    label_image<true>(masks, at, grid, slots, size, rows, labels);
}
#endif

Image chosen(bool fused) {
#if SPOT_X86
    if (fused && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return avx2_image;
    }
#endif
    return fused ? fused_image : plain_image;
}

}  // namespace

int spot_mask_labels(const float* masks, int64_t batch, int64_t grid, int64_t slots, int64_t size, int32_t fused,
                     int32_t threads, uint8_t* labels) {
    if (grid < 1 || slots < 1 || slots > 256 || size < 1) {
        return SPOT_BAD_SIZE;
    }
    if (batch == 0) {
        return SPOT_OK;
    }
    if (!spot::countable({batch, grid, grid, slots}) || !spot::countable({batch, size, size}) ||
        !spot::countable({grid, slots, size}) || !masks || !labels) {
        return SPOT_BAD_SIZE;
    }
    std::atomic<bool> enough{true};
    try {
        const std::vector<Mix> at = mixes(grid, size, fused);
        const Image image = chosen(fused);
        const double nanoseconds = static_cast<double>(size) * size * slots / kMixesPerNs;
        spot::each_image(threads, batch, nanoseconds, [&](int64_t b) noexcept {
            try {
                // one image's maps resized along x: small beside the work on them
                std::vector<float> rows(grid * slots * size);
                image(masks + b * grid * grid * slots, at.data(), grid, slots, size, rows.data(),
                      labels + b * size * size);
            } catch (const std::exception&) {
                enough = false;
            }
        });
    } catch (const std::exception&) {
        return SPOT_NO_MEMORY;
    }
    return enough ? SPOT_OK : SPOT_NO_MEMORY;
}
