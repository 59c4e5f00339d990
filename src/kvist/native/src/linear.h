// Rounded activations times packed 4- and 8-bit weights, for one row and for many.
//
// One row is bound by memory: each weight is read once, in order, and fetched ahead of its use. Up
// to MAX_ROWS rows share that one pass. More are bound by arithmetic: a group is unpacked once into
// the nearest cache and met by tiles of rows.
#pragma once
#include "kernels.h"
#include "simd.h"
#include "vectors.h"

namespace {

using namespace kvist;

// What a row's block adds, given its scale and the block's integer sum.
inline int blocks_of(const Activations& x) { return x.columns / BLOCK; }

// A row's bytes, and where its blocks' scales and sums begin, ROW_TILE apart.
struct Row {
    const int8_t* q;
    const float *scale, *sum;
    const int32_t* isum;
};

inline Row row_of(const Activations& x, int r) {
    const int64_t at = x.block_at(r, 0);
    return {x.q + (int64_t)r * x.columns, x.scale + at, x.sum + at, x.isum + at};
}

template <int ROWS>
inline void q4_group(const uint8_t* w, const Activations& x, int first, Floats* out) {
    const int blocks = blocks_of(x);
    Row row[ROWS];
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = row_of(x, first + r), acc[r] = splat(0.f);
    for (int b = 0; b < blocks; b++, w += Q4_BLOCK) {
        for (int i = 0; i < Q4_BLOCK; i += 64) prefetch(w + AHEAD + i);
        Bytes low[4], high[4];
        for (int j = 0; j < 4; j++) {
            Bytes both = load_bytes(w + 64 * j);
            low[j] = low_nibbles(both), high[j] = high_nibbles(both);
        }
        Floats d = load_half(w + 256), m = load_half(w + 288);
        for (int r = 0; r < ROWS; r++) {
            const int8_t* q = row[r].q + b * BLOCK;
            Ints even = splat_int(0), odd = splat_int(0);
            for (int j = 0; j < 4; j++) {
                even = dot(even, low[j], q + 4 * j);
                odd = dot(odd, high[j], q + 16 + 4 * j);
            }
            acc[r] = fma(to_floats(even + odd) * d, splat(row[r].scale[b * ROW_TILE]), acc[r]);
            acc[r] = fma(m, splat(row[r].sum[b * ROW_TILE]), acc[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) out[r] = acc[r];
}

template <int ROWS>
inline void q8_group(const uint8_t* w, const Activations& x, int first, Floats* out) {
    const int blocks = blocks_of(x);
    Row row[ROWS];
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = row_of(x, first + r), acc[r] = splat(0.f);
    for (int b = 0; b < blocks; b++, w += Q8_BLOCK) {
        for (int i = 0; i < Q8_BLOCK; i += 64) prefetch(w + AHEAD + i);
        Bytes bytes[8];
        for (int j = 0; j < 8; j++) bytes[j] = load_bytes(w + 64 * j);
        Floats d = load_half(w + 512);
        for (int r = 0; r < ROWS; r++) {
            const int8_t* q = row[r].q + b * BLOCK;
            Ints even = splat_int(UNSIGNED_DOT ? -128 * row[r].isum[b * ROW_TILE] : 0), odd = splat_int(0);
            for (int j = 0; j < 8; j += 2) {
                even = dot_q8(even, bytes[j], q + 4 * j);
                odd = dot_q8(odd, bytes[j + 1], q + 4 * j + 4);
            }
            acc[r] = fma(to_floats(even + odd) * d, splat(row[r].scale[b * ROW_TILE]), acc[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) out[r] = acc[r];
}

template <int ROWS>
inline void few_rows(const Matrix& matrix, int begin, int end, const Activations& x, int first,
                     float* out, int64_t ld, bool add) {
    for (int g = begin; g < end; g++) {
        const uint8_t* w = matrix.data + g * matrix.stride;
        Floats y[ROWS];
        if (matrix.kind == Q4) q4_group<ROWS>(w, x, first, y);
        else q8_group<ROWS>(w, x, first, y);
        for (int r = 0; r < ROWS; r++) {
            float* to = out + r * ld + (int64_t)g * LANES;
            store(to, add ? load(to) + y[r] : y[r]);
        }
    }
}

// A group with its nibbles and halves spread out: 8 x 64 bytes a block, then d and m as floats.
struct Unpacked {
    uint8_t* bytes;
    float* scales;
};

inline void unpack_group(const Matrix& matrix, const uint8_t* w, const Unpacked& to) {
    for (int b = 0; b < matrix.columns / BLOCK; b++) {
        uint8_t* bytes = to.bytes + b * 512;
        if (matrix.kind == Q4) {
            for (int j = 0; j < 4; j++) {
                Bytes both = load_bytes(w + 64 * j);
                store_bytes(bytes + 64 * j, low_nibbles(both));
                store_bytes(bytes + 64 * (4 + j), high_nibbles(both));
            }
            store(to.scales + 32 * b + 16, load_half(w + 288));
            store(to.scales + 32 * b, load_half(w + 256));
        } else {
            for (int j = 0; j < 8; j++) store_bytes(bytes + 64 * j, load_bytes(w + 64 * j));
            store(to.scales + 32 * b, load_half(w + 512));
        }
        w += block_bytes(matrix.kind);
    }
}

constexpr int TILE = MAX_ROWS == 8 ? 12 : MAX_ROWS;  // chains enough to hide the dot's latency

template <Kind KIND, int ROWS>
inline void tile_of_rows(const Unpacked& w, const Activations& x, int first, float* out,
                         int64_t ld, bool add) {
    Row row[ROWS];
    Floats acc[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = row_of(x, first + r), acc[r] = splat(0.f);
    for (int b = 0; b < blocks_of(x); b++) {
        Ints whole[ROWS];
        const bool offset = KIND == Q8 && UNSIGNED_DOT;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) whole[r] = splat_int(offset ? -128 * row[r].isum[b * ROW_TILE] : 0);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            Bytes bytes = load_bytes(w.bytes + b * 512 + 64 * j);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const int8_t* q = row[r].q + b * BLOCK + 4 * j;
                whole[r] = KIND == Q4 ? dot(whole[r], bytes, q) : dot_q8(whole[r], bytes, q);
            }
        }
        Floats d = load(w.scales + 32 * b);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++)
            acc[r] = fma(to_floats(whole[r]) * d, splat(row[r].scale[b * ROW_TILE]), acc[r]);
        if (KIND == Q4) {
            Floats m = load(w.scales + 32 * b + 16);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) acc[r] = fma(m, splat(row[r].sum[b * ROW_TILE]), acc[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float* to = out + r * ld;
        store(to, add ? load(to) + acc[r] : acc[r]);
    }
}

template <Kind KIND>
inline void all_tiles(const Unpacked& w, const Activations& x, int rows, float* out, int64_t ld,
                      bool add) {
    int r = 0;
    for (; r + TILE <= rows; r += TILE)
        tile_of_rows<KIND, TILE>(w, x, r, out + r * ld, ld, add);
    for (; r + 4 <= rows && TILE > 4; r += 4)
        tile_of_rows<KIND, 4>(w, x, r, out + r * ld, ld, add);
    for (; r < rows; r++) tile_of_rows<KIND, 1>(w, x, r, out + r * ld, ld, add);
}

// Floats: every column's 16 weights times each row's value, in two sums, of even and odd columns.
template <Kind KIND> inline Floats weights_at(const uint8_t* w, int column) {
    return KIND == W32 ? load((const float*)w + column * LANES)
                       : load_bf16((const uint16_t*)w + column * LANES);
}

template <Kind KIND, int ROWS>
inline void float_rows(const uint8_t* w, int columns, const float* x, float* out, int64_t ld,
                       bool add) {
    Floats even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; r++) even[r] = odd[r] = splat(0.f);
    constexpr int BYTES = LANES * (KIND == W32 ? 4 : 2);
    for (int c = 0; c < columns; c += 2) {
        prefetch(w + AHEAD + c * BYTES);
        if (KIND == W32) prefetch(w + AHEAD + c * BYTES + BYTES);
        const Floats a = weights_at<KIND>(w, c), b = weights_at<KIND>(w, c + 1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            even[r] = fma(a, splat(x[r * columns + c]), even[r]);
            odd[r] = fma(b, splat(x[r * columns + c + 1]), odd[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const Floats y = even[r] + odd[r];
        float* to = out + r * ld;
        store(to, add ? load(to) + y : y);
    }
}

template <Kind KIND>
inline void float_linear(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                         float* out, int64_t ld, bool add) {
    constexpr int TOGETHER = MAX_ROWS == 8 ? 8 : 4;
    const int columns = matrix.columns;
    for (int g = begin; g < end; g++) {
        const uint8_t* w = matrix.data + g * matrix.stride;
        float* to = out + (int64_t)g * LANES;
        const float* row = x.floats;
        int r = 0;
        for (; r + TOGETHER <= rows; r += TOGETHER)
            float_rows<KIND, TOGETHER>(w, columns, row + (int64_t)r * columns, to + r * ld, ld, add);
        for (; r + 2 <= rows; r += 2)
            float_rows<KIND, 2>(w, columns, row + (int64_t)r * columns, to + r * ld, ld, add);
        if (r < rows)
            float_rows<KIND, 1>(w, columns, row + (int64_t)r * columns, to + r * ld, ld, add);
    }
}

[[maybe_unused]] void linear(const Matrix& matrix, int begin, int end, const Activations& x, int rows, float* out,
            int64_t ld, bool add, void* scratch) {
    if (matrix.kind == W32) return float_linear<W32>(matrix, begin, end, x, rows, out, ld, add);
    if (matrix.kind == W16) return float_linear<W16>(matrix, begin, end, x, rows, out, ld, add);
    switch (rows <= MAX_ROWS ? rows : 0) {
        case 1: return few_rows<1>(matrix, begin, end, x, 0, out, ld, add);
        case 2: return few_rows<2>(matrix, begin, end, x, 0, out, ld, add);
#if defined(__AVX512VNNI__)
        case 3: return few_rows<3>(matrix, begin, end, x, 0, out, ld, add);
        case 4: return few_rows<4>(matrix, begin, end, x, 0, out, ld, add);
        case 5: return few_rows<5>(matrix, begin, end, x, 0, out, ld, add);
        case 6: return few_rows<6>(matrix, begin, end, x, 0, out, ld, add);
        case 7: return few_rows<7>(matrix, begin, end, x, 0, out, ld, add);
        case 8: return few_rows<8>(matrix, begin, end, x, 0, out, ld, add);
#endif
        default: break;
    }
    const int blocks = matrix.columns / BLOCK;
    const Unpacked unpacked{(uint8_t*)scratch, (float*)((uint8_t*)scratch + 512 * blocks)};
    for (int g = begin; g < end; g++) {
        unpack_group(matrix, matrix.data + g * matrix.stride, unpacked);
        float* to = out + (int64_t)g * LANES;
        if (matrix.kind == Q4) all_tiles<Q4>(unpacked, x, rows, to, ld, add);
        else all_tiles<Q8>(unpacked, x, rows, to, ld, add);
    }
}

// Blocks of 32 hidden units by some kernel's `linear`: see Kernels::gate_up.
template <typename Linear, typename Put>
inline void gate_up_with(Linear multiply, Put put_block, const Matrix& gate, const Matrix& up,
                         int begin, int end, const Activations& x, int rows, const Activations& to,
                         void* scratch) {
    float* both = (float*)((uint8_t*)scratch + group_scratch(gate.columns));  // [rows, 64]
    for (int block = begin; block < end; block++) {
        Matrix two = gate;
        two.data += 2 * block * gate.stride, two.next = nullptr;
        multiply(two, 0, 2, x, rows, both, 64, false, scratch);
        two = up;
        two.data += 2 * block * up.stride;
        multiply(two, 0, 2, x, rows, both + 32, 64, false, scratch);
        for (int r = 0; r < rows; r++) {
            const float* h = both + 64 * r;
            put_block(silu(load(h)) * load(h + 32), silu(load(h + 16)) * load(h + 48), to, r, block);
        }
    }
}

}  // namespace
