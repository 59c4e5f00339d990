// Kernels of the head's coarse copy (see screen.h), for processors with AVX-512 VNNI.
//
// A block of 16 rows, 352 bytes: 4 x 64 bytes, byte 4r + i of vector j = the lower 4 bits of the codes of
// inputs 4j + i (low nibble) and 16 + 4j + i (high) of row r; 8 x 8 bytes, bit 4r + i of word j = the
// highest bit of the code of input 4j + i; 16 halves d. A code is the upper 5 bits of a q8 byte, and stands
// for the middle of the 8 numbers that share it: weight = d * (8 code - 124.5).
#pragma once
#include "kernels.h"
#include "simd.h"

#if defined(__AVX512VNNI__)

namespace {

using namespace kvist;

[[maybe_unused]] void coarse_products(const Matrix& coarse, int begin, int end, const CoarseRow& x, float* y) {
    const __m512i highest = _mm512_set1_epi8(16);
    const int blocks = coarse.columns / BLOCK;
    for (int g = begin; g < end; g++) {
        const uint8_t* w = coarse.data + g * coarse.stride;
        Floats total = splat(0.f);
        for (int b = 0; b < blocks; b++, w += COARSE_BLOCK) {
            // What comes soon into the first cache, what comes later into the second.
            for (int i = 0; i < COARSE_BLOCK; i += 64) {
                _mm_prefetch((const char*)w + 2 * AHEAD + i, _MM_HINT_T1);
                prefetch(w + AHEAD / 4 + i);
            }
            const int8_t *high = x.high + b * BLOCK, *low = x.low + b * BLOCK;
            // Sums with the upper and the lower bytes of x, of inputs at even and at odd j.
            Ints upper[2] = {splat_int(0), splat_int(0)}, lower[2] = {splat_int(0), splat_int(0)};
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const Bytes both = load_bytes(w + 64 * (j % 4));
                const Bytes nibbles = j < 4 ? low_nibbles(both) : high_nibbles(both);
                uint64_t bits;
                memcpy(&bits, w + 256 + 8 * j, 8);
                const Bytes codes{_mm512_mask_add_epi8(nibbles.v, bits, nibbles.v, highest)};
                upper[j % 2] = dot(upper[j % 2], codes, high + 4 * j);
                lower[j % 2] = dot(lower[j % 2], codes, low + 4 * j);
            }
            const Ints whole = Ints{_mm512_slli_epi32((upper[0] + upper[1]).v, 8)} + (lower[0] + lower[1]);
            const Floats part = fma(to_floats(whole), splat(x.scale[b]), splat(x.offset[b]));
            total = fma(load_half(w + 320), part, total);
        }
        store(y + (int64_t)g * LANES, total);
    }
}

// A weight as products see it: matrix units round it to bfloat16.
inline Floats seen(Floats w, bool tiles) {
    if (!tiles) return w;
    const __m512i bits = (__m512i)w.v, one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return {(__m512)_mm512_and_si512(up, _mm512_set1_epi32(~0xffff))};
}

// What 16 bytes of a q8 row or column leave of a bound: the gap's square, and the largest number's.
struct Gaps {
    Floats apart = splat(0.f), size = splat(0.f);

    void add(__m512i q, Floats d, Floats p, bool tiles) {
        const Floats full = seen(Floats{_mm512_cvtepi32_ps(q)} * d, tiles);
        const __m512i floor = _mm512_and_si512(q, _mm512_set1_epi32(~7));
        const Floats gap = full - (Floats{_mm512_cvtepi32_ps(floor)} + splat(3.5f)) * d;
        const Floats most = splat(128.f) * d;
        apart = fma(gap * gap, p, apart);
        size = fma(most * most, p, size);
    }
};

// Sums of floats are off by less than 2^-24 of their terms' sizes for each term added. Terms are a weight,
// no more than 128 d (1 + 2^-9) once rounded, times x; of the coarse product up to 248 d, in few sums a
// block. Twice 2^-24 and 64 terms more are for that; roots and these sums are off by less than a thousandth.
inline float bound_of(float apart, float size, int columns) {
    const float rounding = (float)(columns + 64) * 0x1p-23f;
    return (__builtin_sqrtf(apart) + rounding * __builtin_sqrtf(size)) * 1.001f + 1e-30f;
}

[[maybe_unused]] float coarse_bounds(const Matrix& full, bool tiles, int begin, int end, const float* p,
                                     float* bounds) {
    float most = 0.f;
    for (int g = begin; g < end; g++) {
        Gaps rows[LANES], lanes;
        const uint8_t* w = full.data + g * full.stride;
        for (int b = 0; b < full.columns / BLOCK; b++, w += Q8_BLOCK, p += BLOCK) {
            const Floats d = load_half(w + 512);
            alignas(64) float scales[LANES];
            store(scales, d);
            for (int r = 0; r < LANES && tiles; r++)
                for (int i = 0; i < BLOCK; i += LANES) {
                    const __m128i q = _mm_loadu_si128((const __m128i*)(w + 32 * r + i));
                    rows[r].add(_mm512_cvtepi8_epi32(q), splat(scales[r]), load(p + i), true);
                }
            for (int j = 0; j < 8 && !tiles; j++) {
                const __m512i four = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * j), _mm512_set1_epi8(-128));
                for (int i = 0; i < 4; i++) {
                    const __m512i up = _mm512_sllv_epi32(four, _mm512_set1_epi32(24 - 8 * i));
                    lanes.add(_mm512_srai_epi32(up, 24), d, splat(p[4 * j + i]), false);
                }
            }
        }
        p -= full.columns;
        alignas(64) float apart[LANES], size[LANES];
        store(apart, lanes.apart);
        store(size, lanes.size);
        for (int r = 0; r < LANES && tiles; r++) apart[r] = sum(rows[r].apart), size[r] = sum(rows[r].size);
        for (int r = 0; r < LANES; r++) {
            bounds[g * LANES + r] = bound_of(apart[r], size[r], full.columns);
            most = size[r] > most ? size[r] : most;
        }
    }
    return __builtin_sqrtf(most);
}

[[maybe_unused]] int coarse_reaching(const float* y, const float* bounds, float length, float least,
                                     int group, int end) {
    const __m512 far = _mm512_set1_ps(length), enough = _mm512_set1_ps(least);
    for (; group < end; group++) {
        const int64_t at = (int64_t)group * LANES;
        const __m512 most = _mm512_fmadd_ps(_mm512_loadu_ps(bounds + at), far, _mm512_loadu_ps(y + at));
        if (_mm512_cmp_ps_mask(most, enough, _CMP_NLT_UQ)) return group;
    }
    return end;
}

}  // namespace

#endif
