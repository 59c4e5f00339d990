// Some rows on matrix units (AMX): sums of a block's products of bytes, scaled as ever.
//
// The unit adds up whole numbers, so a row comes out to the bit as the AVX-512 kernels have it; what
// differs is that a tile of rows meets a block of a group in one instruction. Packed groups are laid
// out as the unit reads them already. Fewer rows go to those kernels.
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "linear.h"
#include "vectors.h"

namespace {

constexpr int FROM_ROWS = 3;
constexpr int AT_ONCE = 4;  // blocks that are under way together
constexpr int TILE_INTS = 16 * LANES;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 32, 64};  // 0-3 sums, 4 rows, 5 weights
    uint8_t rows[16] = {};

    explicit TileShapes(int count) {
        for (int i = 0; i < 5; i++) rows[i] = (uint8_t)count;
        rows[5] = BLOCK / 4;
    }
};

// A group's blocks as tiles, with their scales and minima as floats.
struct Group {
    const uint8_t* bytes;
    int64_t stride;  // from block to block
    const float* scales;  // [blocks, 32]: 16 scales, 16 minima
};

Group group_of(const Matrix& matrix, int index, void* scratch) {
    const uint8_t* w = matrix.data + index * matrix.stride;
    const int blocks = matrix.columns / BLOCK;
    uint8_t* bytes = (uint8_t*)scratch;
    float* scales = (float*)(bytes + 512 * blocks);
    const Unpacked to{bytes, scales};
    if (matrix.kind == Q4) {
        for (int i = 0; i < 512; i += 64) prefetch(w + matrix.stride + i);
        unpack_group(matrix, w, to);
        return {bytes, 512, scales};
    }
    for (int b = 0; b < blocks; b++) store(scales + 32 * b, load_half(w + b * Q8_BLOCK + 512));
    return {w, Q8_BLOCK, scales};
}

// A block's products into one of four tiles. (The unit's registers are named by literals.)
#define KVIST_MULTIPLY(TILE)                                                      \
    if (count > TILE) {                                                           \
        _tile_zero(TILE);                                                         \
        _tile_loadd(4, rows + (block + TILE) * BLOCK, columns);                   \
        _tile_loadd(5, group.bytes + (block + TILE) * group.stride, 64);          \
        _tile_dpbsud(TILE, 4, 5);                                                 \
        _tile_stored(TILE, sums + TILE * TILE_INTS, 64);                          \
    }

inline void multiply(const Group& group, const int8_t* rows, int64_t columns, int block, int count,
                     int32_t* sums) {
    KVIST_MULTIPLY(0)
    KVIST_MULTIPLY(1)
    KVIST_MULTIPLY(2)
    KVIST_MULTIPLY(3)
}

// ROWS rows from `first` on, times one group. Sums of some blocks are scaled while the unit makes
// the next ones.
template <Kind KIND, int ROWS>
void tile_times_group(const Group& group, const Activations& x, int first, int rows, float* out,
                      int64_t ld, bool add) {
    const int blocks = x.columns / BLOCK;
    const Row row = row_of(x, first);
    alignas(64) int32_t sums[2][AT_ONCE * TILE_INTS];
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) acc[r] = splat(0.f);
    multiply(group, row.q, x.columns, 0, blocks < AT_ONCE ? blocks : AT_ONCE, sums[0]);
    for (int b = 0, turn = 0; b < blocks; b += AT_ONCE, turn ^= 1) {
        const int here = blocks - b < AT_ONCE ? blocks - b : AT_ONCE;
        const int left = blocks - b - AT_ONCE;
        if (left > 0)
            multiply(group, row.q, x.columns, b + AT_ONCE, left < AT_ONCE ? left : AT_ONCE,
                     sums[turn ^ 1]);
        for (int i = 0; i < here; i++) {
            const int at = b + i;
            const Floats d = load(group.scales + 32 * at), m = load(group.scales + 32 * at + 16);
            const int32_t* sum = sums[turn] + i * TILE_INTS;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                Ints whole = {_mm512_load_si512(sum + r * LANES)};
                if (KIND == Q8) whole = whole + splat_int(-128 * row.isum[r * blocks + at]);
                acc[r] = fma(to_floats(whole) * d, splat(row.scale[r * blocks + at]), acc[r]);
                if (KIND == Q4) acc[r] = fma(m, splat(row.sum[r * blocks + at]), acc[r]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        float* to = out + r * ld;
        store(to, add ? load(to) + acc[r] : acc[r]);
    }
}

template <Kind KIND>
void rows_times_group(const Group& group, const Activations& x, int rows, float* out, int64_t ld,
                      bool add) {
    if (rows <= 4) return tile_times_group<KIND, 4>(group, x, 0, rows, out, ld, add);
    if (rows <= 8) return tile_times_group<KIND, 8>(group, x, 0, rows, out, ld, add);
    for (int r = 0; r < rows; r += ROW_TILE)
        tile_times_group<KIND, ROW_TILE>(group, x, r, rows - r < ROW_TILE ? rows - r : ROW_TILE,
                                         out + r * ld, ld, add);
}

void linear_on_tiles(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                     float* out, int64_t ld, bool add, void* scratch) {
    if (rows < FROM_ROWS)
        return kernels_avx512()->linear(matrix, begin, end, x, rows, out, ld, add, scratch);
    const TileShapes shapes(rows <= 4 ? 4 : rows <= 8 ? 8 : ROW_TILE);
    _tile_loadconfig(&shapes);
    for (int g = begin; g < end; g++) {
        const Group group = group_of(matrix, g, scratch);
        float* to = out + (int64_t)g * LANES;
        if (matrix.kind == Q4) rows_times_group<Q4>(group, x, rows, to, ld, add);
        else rows_times_group<Q8>(group, x, rows, to, ld, add);
    }
    _tile_release();
}

void gate_up_on_tiles(const Matrix& gate, const Matrix& up, int begin, int end,
                      const Activations& x, int rows, const Activations& to, void* scratch) {
    if (rows < FROM_ROWS)
        return kernels_avx512()->gate_up(gate, up, begin, end, x, rows, to, scratch);
    gate_up_with(linear_on_tiles, gate, up, begin, end, x, rows, to, scratch);
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
        // Leaf 7, EDX: bit 25 AMX-INT8, 24 tiles.
        uint32_t a, b, c, d;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        if (!(d >> 25 & 1) || !(d >> 24 & 1) || !granted()) return nullptr;
        static Kernels table = *kernels_avx512();
        table.name = "amx";
        table.linear = linear_on_tiles;
        table.gate_up = gate_up_on_tiles;
        return &table;
    }();
    return found;
}

}  // namespace kvist

#else  // another system, or a compiler that does not know the unit

const kvist::Kernels* kvist::kernels_amx() { return nullptr; }

#endif
