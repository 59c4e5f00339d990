// What matrix units (AMX) need: shapes of tiles, and rows and columns exchanged.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using namespace kvist;

constexpr int TILE_BYTES = 1024;  // 16 rows of 16 floats, or of 32 bfloat16

// (Not std::min: no function of another translation unit's may be built for this processor.)
inline int least(int a, int b) { return a < b ? a : b; }

// What the unit is told of its tiles; for each, rows and bytes of a row.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The unit is configured while this lives.
class Tiles {
  public:
    explicit Tiles(const TileShapes& shapes) : shapes_(shapes) {
        asm volatile("" : : "r"(&shapes_) : "memory");  // the intrinsic does not say what it reads
        _tile_loadconfig(&shapes_);
    }
    ~Tiles() { _tile_release(); }

  private:
    const TileShapes shapes_;
};

// 16 rows of 16 dwords.
inline void transpose(__m512* v) {
    __m512 a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = (__m512)_mm512_unpacklo_pd((__m512d)a[i], (__m512d)a[i + 2]);
        v[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)a[i], (__m512d)a[i + 2]);
        v[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)a[i + 1], (__m512d)a[i + 3]);
        v[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)a[i + 1], (__m512d)a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
        v[4 + i] = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
    }
}

// 16 rows of 16 floats, aligned, that lie one behind the other -> their columns.
inline void load_columns(const float* rows, __m512* v) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = _mm512_load_ps(rows + 16 * i);
    transpose(v);
}

// 32 floats, rounded to bfloat16, in order.
inline __m512i rounded(Floats first, Floats second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
}

// Two times 16 floats, rounded to bfloat16, in pairs of one each.
inline __m512i rounded_pairs(Floats even, Floats odd) {
    alignas(64) static constexpr uint16_t IN_TURN[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), rounded(even, odd));
}

}  // namespace
