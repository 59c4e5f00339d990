// What every instruction set implements: the kernels of one decoder step, as a table of functions.
//
// Weights are packed once, the same way for all instruction sets. A *group* is 16 rows of a matrix;
// lane r of a vector is row r of the group. Along the columns a group is a run of blocks of 32:
//
//   q4: 4 x 64 bytes, byte 4r+i of vector j = input 4j+i (low nibble) and 16+4j+i (high) of row r,
//       16 halves d, 16 halves m;                    weight = d * nibble + m
//   q8: 8 x 64 bytes, byte 4r+i of vector j = (input 4j+i of row r) ^ 0x80, 16 halves d;
//                                                    weight = d * (byte - 128)
//
//   f32, bf16: 32 x 16 values, column by column.
//
// For matrix units numbers lie row by row instead, scales and minima as above:
//
//   q4: word j of vector v = input j of the rows 4v to 4v + 3, at bits 0, 4, 8 and 12, rotated left by one
//   q8: 32 bytes of each row
//
// Activations are rounded to 8 bits with one scale for 32 values, as llama.cpp does, or for matrix units
// to bfloat16 (see amx.cpp); where weights are floats they stay floats.
//
// A row's result is the same to the bit whatever rows stand beside it, and however many threads there
// are: sums of products of bytes are exact, floats are added block by block in one order, and
// attention goes over fixed spans of positions. All kernels of an instruction set keep to this.
#pragma once
#include <cstdint>

namespace kvist {

constexpr int LANES = 16;  // rows of a group
constexpr int BLOCK = 32;  // columns that share a scale
constexpr int Q4_BLOCK = 320, Q8_BLOCK = 544, COARSE_BLOCK = 352;  // bytes of a group's block

enum Kind : int32_t { Q4 = 0, Q8 = 1, W32 = 2, W16 = 3, COARSE = 4 };
enum Element : int32_t { F32 = 0, BF16 = 1, I8 = 2, U4 = 3 };

constexpr int SPAN = 128;  // positions that attention takes together; softmax is merged over spans
constexpr int MOST_HEAD_DIM = 256;
constexpr int ROW_TILE = 16;  // rows of activations have room up to a multiple of this

constexpr int block_bytes(Kind kind) {
    switch (kind) {
        case Q4: return Q4_BLOCK;
        case Q8: return Q8_BLOCK;
        case COARSE: return COARSE_BLOCK;
        default: return BLOCK * LANES * (kind == W32 ? 4 : 2);
    }
}
constexpr bool in_floats(Kind kind) { return kind == W32 || kind == W16; }

struct Matrix {
    const uint8_t* data;  // of group 0
    int64_t stride;       // bytes from a group to the next
    int32_t groups;       // of 16 rows; rows that fill up the last are zero
    int32_t columns;
    Kind kind;
    const uint8_t* next = nullptr;  // what is read after the part that a kernel is asked for, if known
};

// Rows of activations as kernels multiply them. Row r, block b: values q[r * columns + 32 b + i] *
// scale[block_at(r, b)]; isum is the sum of the block's q, sum that times the scale. What belongs to
// a block lies side by side for a tile of rows.
struct Activations {
    int8_t* q;
    float* scale;
    float* sum;
    int32_t* isum;
    float* floats;    // [rows, columns] instead, where weights are floats
    uint16_t* tiles;  // bfloat16 instead, for matrix units: see amx.cpp
    int32_t columns;
    bool lone = false;  // one row in all, whose tiles have one column

    int64_t block_at(int row, int block) const {
        return ((int64_t)(row / ROW_TILE) * (columns / BLOCK) + block) * ROW_TILE + row % ROW_TILE;
    }
    // What begins at `row`, a multiple of ROW_TILE.
    Activations from(int64_t row) const {
        const int64_t numbers = row * columns, blocks = row * (columns / BLOCK);
        if (floats) return {q, scale, sum, isum, floats + numbers, tiles, columns};
        if (tiles) return {q, scale, sum, isum, floats, tiles + numbers, columns};
        return {q + numbers, scale + blocks, sum + blocks, isum + blocks, floats, tiles, columns};
    }
};

// A row of activations for coarse weights: 16 bits of each value, 256 high + low, times a scale for each
// block. `scale` is 8 of these scales, `offset` the block's sum times -124.5 of them.
struct CoarseRow {
    const int8_t *high, *low;
    const float *scale, *offset;
};

// One head of one side of the cache of one sequence. The token at position p begins at place
// table[p / block_size] * block_stride + p % block_size * token_stride of its plane; in a ring,
// positions from ring_from on go round and round over `ring` places behind it.
//
// I8: number * scale, one for the head. U4: number * scale + zero for each `group` of channels; byte
// i has channel i in its low and i + head_dim / 2 in its high bits. Both are of the Hadamard basis.
struct HeadPlane {
    void* x;  // strides in elements; in bytes for U4
    uint16_t *scale, *zero;
    const float* centre;  // [head_dim], taken away before a key is encoded, or null
    const int32_t* table;
    int64_t block_stride, token_stride, scale_block_stride, scale_token_stride;
    int32_t block_size, ring, ring_from;
    int32_t group;  // a power of two, 16 or more
    Element element;
};

// Attention of some queries over one span of positions, [begin, end). Query i sees
// what is in [first[i], last[i]) or, before last[i], in [0, sinks).
struct Attention {
    HeadPlane keys, values;
    const float* q;  // [queries, head_dim], scaled, in the keys' basis
    int32_t queries, head_dim, begin, end, sinks;
    const int32_t *first, *last;
    float* out;  // [queries, part_record]
    bool fetch;  // whether the span is read from memory, this once
};

// A query's part of a span: sum of exp(score - max) * value for each channel, max, sum of exp.
constexpr int64_t part_record(int64_t head_dim) { return head_dim + 16; }

struct Kernels {
    const char* name;
    bool tiles;    // for matrix units: quantised weights and activations lie as tiles
    int together;  // queries that best share a reading of the cache, 64 at most
    const Kernels* for_floats;  // what runs weights in floats instead, or null
    void (*quantise)(const float* x, const Activations& to, int row);
    void (*norm_quantise)(const float* x, const float* weight, float eps, const Activations& to,
                          int row);
    void (*norm)(float* x, const float* weight, float eps, int size);
    // out[r * ld + 16 g + lane], g in [begin, end), stored or added; scratch: see scratch_bytes.
    void (*linear)(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                   float* out, int64_t ld, bool add, void* scratch);
    // Blocks [begin, end) of 32 hidden units: to = quantise(silu(gate x) * (up x)).
    void (*gate_up)(const Matrix& gate, const Matrix& up, int begin, int end, const Activations& x,
                    int rows, const Activations& to, void* scratch);
    // For who asks where the largest logit is: see screen.h and coarse.h; null where there are none.
    void (*coarse)(const Matrix& coarse, int begin, int end, const CoarseRow& x, float* y);
    // For each row of the groups [begin, end) of a q8 matrix: what its product with any x and that of its
    // coarse copy differ by at most, over |x / sqrt(p)|. Returns the largest |128 d sqrt(p)| of a row.
    float (*bound)(const Matrix& full, bool tiles, int begin, int end, const float* p, float* bounds);
    // The first group from `group` on that has a y + bound * length of `least` or more, or a NaN; or end.
    int (*reaching)(const float* y, const float* bounds, float length, float least, int group, int end);
    void (*rotate)(float* x, const float* cos_sin, int head_dim, float scale);
    // Queries into the Hadamard basis of keys, or sums of values back from it.
    void (*unrotate)(float* x, int head_dim);
    void (*store)(const HeadPlane& plane, int position, const float* x, int head_dim);
    void (*attend)(const Attention& task);
    // A query's parts, `stride` floats apart, merged in order.
    void (*merge)(const float* parts, int64_t stride, int count, int head_dim, float* out);
    int64_t (*argmax)(const float* x, int64_t size);
    bool (*all_finite)(const float* x, int64_t size);
};

// Bytes of a thread's scratch: two unpacked groups or chunks of four, and 64 columns of rows behind them.
constexpr int64_t group_scratch(int64_t columns) { return columns * 64 + 8192; }
constexpr int64_t scratch_bytes(int64_t columns, int64_t rows) {
    return group_scratch(columns) + rows * 64 * 4;
}

const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

}  // namespace kvist
