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

constexpr int FROM_ROWS = 9;  // what no pass over the weights serves from registers
constexpr int TILE_INTS = 16 * LANES;

struct alignas(64) TileShapes {  // 0 and 1 sums, 4 rows, 5 weights
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 0, 0, BLOCK, 64};
    uint8_t rows[16] = {ROW_TILE, ROW_TILE, 0, 0, ROW_TILE, BLOCK / 4};
};

// A group's blocks as tiles, with their scales and minima as floats.
struct Group {
    const uint8_t* bytes;
    int64_t stride;       // from block to block
    const float* scales;  // [blocks, 32]: 16 scales, 16 minima
};

Group group_of(const Matrix& matrix, int index, uint8_t* space) {
    const uint8_t* w = matrix.data + index * matrix.stride;
    const int blocks = matrix.columns / BLOCK;
    float* scales = (float*)(space + 512 * blocks);
    if (matrix.kind == Q4) {
        unpack_group(matrix, w, {space, scales});
        return {space, 512, scales};
    }
    for (int b = 0; b < blocks; b++) store(scales + 32 * b, load_half(w + b * Q8_BLOCK + 512));
    return {w, Q8_BLOCK, scales};
}

// Into one of the unit's tiles a block's products, and from there. (Tiles are named by literals.)
#define KVIST_MULTIPLY(TILE, BLOCK_INDEX)                                   \
    _tile_zero(TILE);                                                       \
    _tile_loadd(4, row.q + (BLOCK_INDEX) * BLOCK, x.columns);               \
    _tile_loadd(5, group.bytes + (BLOCK_INDEX) * group.stride, 64);         \
    _tile_dpbsud(TILE, 4, 5)

template <Kind KIND>
inline void add_scaled(const int32_t* sums, const Group& group, const Row& row, int block,
                       Floats* acc) {
    const Floats d = load(group.scales + 32 * block), m = load(group.scales + 32 * block + 16);
    const float *scale = row.scale + block * ROW_TILE, *sum = row.sum + block * ROW_TILE;
    const int32_t* isum = row.isum + block * ROW_TILE;
#pragma GCC unroll 16
    for (int r = 0; r < ROW_TILE; r++) {
        Ints whole = {_mm512_load_si512(sums + r * LANES)};
        if (KIND == Q8) whole = whole + splat_int(-128 * isum[r]);
        acc[r] = fma(to_floats(whole) * d, splat(scale[r]), acc[r]);
        if (KIND == Q4) acc[r] = fma(m, splat(sum[r]), acc[r]);
    }
}

// A tile of rows from `first` on, times one group. Two blocks' sums are scaled while the unit makes
// the next two.
template <Kind KIND>
void tile_times_group(const Group& group, const Activations& x, int first, int rows, float* out,
                      int64_t ld, bool add) {
    const int blocks = x.columns / BLOCK;
    const Row row = row_of(x, first);
    alignas(64) int32_t sums[2 * TILE_INTS];
    Floats acc[ROW_TILE];
#pragma GCC unroll 16
    for (int r = 0; r < ROW_TILE; r++) acc[r] = splat(0.f);
    KVIST_MULTIPLY(0, 0);
    if (blocks > 1) { KVIST_MULTIPLY(1, 1); }
    for (int block = 0; block < blocks; block += 2) {
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + TILE_INTS, 64);
        if (block + 2 < blocks) { KVIST_MULTIPLY(0, block + 2); }
        if (block + 3 < blocks) { KVIST_MULTIPLY(1, block + 3); }
        add_scaled<KIND>(sums, group, row, block, acc);
        if (block + 1 < blocks) add_scaled<KIND>(sums + TILE_INTS, group, row, block + 1, acc);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROW_TILE; r++) {  // unrolled, so that sums stay in registers
        if (r == rows) return;
        float* to = out + r * ld;
        store(to, add ? load(to) + acc[r] : acc[r]);
    }
}

template <Kind KIND>
void rows_times_groups(const Group* groups, int count, const Activations& x, int rows, float* out,
                       int64_t ld, bool add) {
    for (int r = 0; r < rows; r += ROW_TILE)
        for (int g = 0; g < count; g++)  // rows come from the nearest cache for all but the first
            tile_times_group<KIND>(groups[g], x, r, rows - r, out + r * ld + g * LANES, ld, add);
}

void linear_on_tiles(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                     float* out, int64_t ld, bool add, void* scratch) {
    if (rows < FROM_ROWS || in_floats(matrix.kind))
        return kernels_avx512()->linear(matrix, begin, end, x, rows, out, ld, add, scratch);
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    const int64_t space = (512 + 128) * (int64_t)(matrix.columns / BLOCK);
    for (int g = begin; g < end; g += 2) {
        const int count = end - g < 2 ? 1 : 2;
        Group groups[2];
        for (int i = 0; i < count; i++)
            groups[i] = group_of(matrix, g + i, (uint8_t*)scratch + i * space);
        float* to = out + (int64_t)g * LANES;
        if (matrix.kind == Q4) rows_times_groups<Q4>(groups, count, x, rows, to, ld, add);
        else rows_times_groups<Q8>(groups, count, x, rows, to, ld, add);
    }
    _tile_release();
}

void gate_up_on_tiles(const Matrix& gate, const Matrix& up, int begin, int end,
                      const Activations& x, int rows, const Activations& to, void* scratch) {
    if (rows < FROM_ROWS || in_floats(gate.kind))
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
