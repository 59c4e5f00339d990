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
// Activations are rounded to 8 bits with one scale for 32 values, as llama.cpp does; or, in the
// wide form, to bfloat16 for matrix units.
#pragma once
#include <cstdint>

namespace kvist {

constexpr int LANES = 16;  // rows of a group
constexpr int BLOCK = 32;  // columns that share a scale
constexpr int Q4_BLOCK = 320, Q8_BLOCK = 544;  // bytes of a group's block

enum Kind : int32_t { Q4 = 0, Q8 = 1 };
enum Element : int32_t { F32 = 0, BF16 = 1 };

constexpr int block_bytes(Kind kind) { return kind == Q4 ? Q4_BLOCK : Q8_BLOCK; }

struct Matrix {
    const uint8_t* data;  // of group 0
    int64_t stride;       // bytes from a group to the next
    int32_t groups;       // of 16 rows; rows that fill up the last are zero
    int32_t columns;
    Kind kind;
};

// Rows of activations as kernels multiply them. Row r, block b: values q[r * columns + 32 b + i] *
// scale[r * blocks + b]; isum is the sum of the block's q, sum that times the scale.
struct Activations {
    int8_t* q;
    float* scale;
    float* sum;
    int32_t* isum;
    uint16_t* wide;  // bfloat16 instead, where it is not null
    int32_t columns;
};

// One head of the cache of one sequence: the token at position p begins at
// base + table[p / block_size] * block_stride + p % block_size * token_stride (elements).
struct HeadPlane {
    void* base;
    const int32_t* table;
    int32_t block_size;
    int64_t block_stride, token_stride;
    Element element;
};

// Attention of `queries` rows (head_dim apart, rotated and scaled) over the positions [first, end).
// The result is not divided yet: out[i] = sum exp(score - max[i]) v, with its weight[i].
struct Attention {
    HeadPlane keys, values;
    const float* q;
    float *out, *max, *weight;
    float* scores;  // scratch, queries * (end - first + 32)
    int32_t queries, head_dim, first, end;
};

struct Kernels {
    const char* name;
    int32_t wide_from;  // rows from which activations are wanted in the wide form; 0: never
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
    void (*rotate)(float* x, const float* cos_sin, int head_dim, float scale);
    void (*store)(const HeadPlane& plane, int position, const float* x, int head_dim);
    void (*attend)(const Attention& task);
    // Merge parts of one query's attention, each [head_dim] + max + weight, into out.
    void (*merge)(const float* const* parts, const float* max, const float* weight, int count,
                  int head_dim, float* out);
    int64_t (*argmax)(const float* x, int64_t size);
};

// Bytes of a thread's scratch: two unpacked groups, and 64 columns of rows behind them.
constexpr int64_t group_scratch(int64_t columns) { return columns * 64 + 4096; }
constexpr int64_t scratch_bytes(int64_t columns, int64_t rows) {
    return group_scratch(columns) + rows * 64 * 4;
}

const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

}  // namespace kvist
