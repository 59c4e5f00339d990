// Many rows on matrix units (AMX): weights become bfloat16 once for all rows, a group at a time.
//
// Fewer rows go to the AVX-512 kernels. Wide activations lie in tiles as the unit reads them: 16 rows
// by 32 columns, 1 KB each, [row / 16][column / 32][row % 16][column % 32].
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"
#include "vectors.h"

namespace {

constexpr int WIDE_FROM = 16;
constexpr int64_t TILE = 512;  // elements

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __m512i to_bf16(Floats low, Floats high) {  // low's 16, then high's
    return (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
}

inline void widen_block(Floats a, Floats b, const Activations& to, int row, int block) {
    const int64_t tile = (int64_t)(row / 16) * (to.columns / BLOCK) + block;
    _mm512_storeu_si512(to.wide + tile * TILE + row % 16 * BLOCK, to_bf16(a, b));
}

void quantise_or_widen(const float* x, const Activations& to, int row) {
    if (!to.wide) return quantise(x, to, row);
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK)
        widen_block(load(x), load(x + 16), to, row, b);
}

void norm_quantise_or_widen(const float* x, const float* weight, float eps, const Activations& to,
                            int row) {
    if (!to.wide) return norm_quantise(x, weight, eps, to, row);
    const Floats factor = splat(norm_factor(x, eps, to.columns));
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK, weight += BLOCK)
        widen_block(load(x) * factor * load(weight), load(x + 16) * factor * load(weight + 16), to,
                    row, b);
}

// Byte i of each lane of `bytes` times d plus m: a pair of columns, interleaved as the unit wants.
inline void store_pair(uint16_t* to, __m512i bytes, int shift, Floats d, Floats m) {
    const __m512i mask = _mm512_set1_epi32(255);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bytes, shift), mask);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bytes, shift + 8), mask);
    // Word 2r is the even column's lane r, word 2r + 1 the odd one's.
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25,
                                                9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                                17, 1, 16, 0);
    __m512i both = to_bf16(fma(to_floats({even}), d, m), fma(to_floats({odd}), d, m));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave, both));
}

// A group as tiles of 32 columns: pair p of columns, lane r, two values.
void widen_group(const Matrix& matrix, const uint8_t* w, uint16_t* to) {
    for (int b = 0; b < matrix.columns / BLOCK; b++, to += TILE) {
        if (matrix.kind == Q4) {
            const Floats d = load_half(w + 256), m = load_half(w + 288);
            for (int j = 0; j < 4; j++) {
                prefetch(w + 4096 + 64 * j);
                const Bytes both = load_bytes(w + 64 * j);
                const __m512i low = low_nibbles(both).v, high = high_nibbles(both).v;
                store_pair(to + 64 * j, low, 0, d, m);
                store_pair(to + 64 * j + 32, low, 16, d, m);
                store_pair(to + 256 + 64 * j, high, 0, d, m);
                store_pair(to + 256 + 64 * j + 32, high, 16, d, m);
            }
        } else {
            const Floats d = load_half(w + 512), m = splat(-128.f) * d;
            for (int j = 0; j < 8; j++) {
                prefetch(w + 4096 + 64 * j);
                const __m512i bytes = load_bytes(w + 64 * j).v;
                store_pair(to + 64 * j, bytes, 0, d, m);
                store_pair(to + 64 * j + 32, bytes, 16, d, m);
            }
        }
        w += block_bytes(matrix.kind);
    }
}

inline void put(const float* tile, int rows, float* out, int64_t ld, bool add) {
    for (int r = 0; r < rows; r++) {
        const Floats y = load(tile + 16 * r);
        store(out + r * ld, add ? load(out + r * ld) + y : y);
    }
}

// Rows times two groups, or one (`pair` false): 32 rows at a time, four sums in the unit.
void times_groups(const uint16_t* w, int64_t group_size, bool pair, const Activations& x, int rows,
                  float* out, int64_t ld, bool add) {
    const int blocks = x.columns / BLOCK;
    alignas(64) float sums[4][256];
    for (int r = 0; r < rows; r += 32) {
        const uint16_t* above = x.wide + (int64_t)(r / 16) * blocks * TILE;
        const uint16_t* below = above + blocks * TILE;
        const bool second = r + 16 < rows;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int b = 0; b < blocks; b++) {
            _tile_loadd(4, above + b * TILE, 64);
            _tile_loadd(6, w + b * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (pair) {
                _tile_loadd(7, w + group_size + b * TILE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (second) {
                _tile_loadd(5, below + b * TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
                if (pair) { _tile_dpbf16ps(3, 5, 7); }
            }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        const int upper = rows - r < 16 ? rows - r : 16, lower = rows - r - upper;
        float* to = out + r * ld;
        put(sums[0], upper, to, ld, add);
        if (pair) put(sums[1], upper, to + 16, ld, add);
        if (lower <= 0) continue;
        put(sums[2], lower < 16 ? lower : 16, to + 16 * ld, ld, add);
        if (pair) put(sums[3], lower < 16 ? lower : 16, to + 16 * ld + 16, ld, add);
    }
}

void linear_wide(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                 float* out, int64_t ld, bool add, void* scratch) {
    if (!x.wide)
        return kernels_avx512()->linear(matrix, begin, end, x, rows, out, ld, add, scratch);
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    uint16_t* groups = (uint16_t*)scratch;
    const int64_t size = matrix.columns * LANES;
    for (int g = begin; g < end; g += 2) {
        const bool pair = g + 1 < end;
        widen_group(matrix, matrix.data + g * matrix.stride, groups);
        if (pair) widen_group(matrix, matrix.data + (g + 1) * matrix.stride, groups + size);
        times_groups(groups, size, pair, x, rows, out + (int64_t)g * LANES, ld, add);
    }
    _tile_release();
}

void gate_up_wide(const Matrix& gate, const Matrix& up, int begin, int end, const Activations& x,
                  int rows, const Activations& to, void* scratch) {
    if (!x.wide) return kernels_avx512()->gate_up(gate, up, begin, end, x, rows, to, scratch);
    float* both = (float*)((uint8_t*)scratch + group_scratch(gate.columns));  // [rows, 64]
    for (int block = begin; block < end; block++) {
        Matrix two = gate;
        two.data += 2 * block * gate.stride;
        linear_wide(two, 0, 2, x, rows, both, 64, false, scratch);
        two = up;
        two.data += 2 * block * up.stride;
        linear_wide(two, 0, 2, x, rows, both + 32, 64, false, scratch);
        for (int r = 0; r < rows; r++) {
            const float* h = both + 64 * r;
            widen_block(silu(load(h)) * load(h + 32), silu(load(h + 16)) * load(h + 48), to, r,
                        block);
        }
    }
}

// Linux grants the unit's state to a process that asks.
bool granted() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

namespace kvist {

const Kernels* kernels_amx() {
    static const Kernels* const found = []() -> const Kernels* {
        // Leaf 7: EDX bit 22 AMX-BF16, 24 tiles; subleaf 1: EAX bit 5 AVX512-BF16.
        uint32_t a, b, c, d;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        const bool units = d >> 22 & d >> 24 & 1;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
        if (!units || !(a >> 5 & 1) || !granted()) return nullptr;
        static Kernels table = *kernels_avx512();
        table.name = "amx";
        table.wide_from = WIDE_FROM;
        table.quantise = quantise_or_widen;
        table.norm_quantise = norm_quantise_or_widen;
        table.linear = linear_wide;
        table.gate_up = gate_up_wide;
        return &table;
    }();
    return found;
}

}  // namespace kvist

#else  // another system, or a compiler that does not know the unit

const kvist::Kernels* kvist::kernels_amx() { return nullptr; }

#endif
