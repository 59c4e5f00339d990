// A token's keys and values as the cache writes them: floats, or few bits in the Hadamard basis.
//
// Encoding gives the bits that the codecs of the same names give (kvist.cache.codecs), so a cache may
// be written by the one and read by the other.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using namespace kvist;

inline int64_t element_bytes(Element element) {
    return element == F32 ? 4 : element == BF16 ? 2 : 1;
}

// A token's place: which of a plane's, given how far apart blocks and tokens are.
struct Place {
    int64_t block, token;

    Place(const HeadPlane& plane, int position) {
        if (plane.ring && position >= plane.ring_from)
            position = plane.ring_from + (position - plane.ring_from) % plane.ring;
        const int entry = position / plane.block_size;
        block = plane.table[entry], token = position - entry * plane.block_size;
    }
    uint8_t* x(const HeadPlane& plane) const {
        return (uint8_t*)plane.x +
               (block * plane.block_stride + token * plane.token_stride) * element_bytes(plane.element);
    }
    int64_t scale(const HeadPlane& plane) const {
        return block * plane.scale_block_stride + token * plane.scale_token_stride;
    }
};

// Butterflies between lanes of one vector, STEP apart.
template <int STEP> inline Floats butterfly(Floats x) {
    alignas(64) float signs[16];
    for (int i = 0; i < 16; i++) signs[i] = i & STEP ? -1.f : 1.f;
    return fma(x, load(signs), swapped<STEP>(x));
}

// x H for Sylvester's matrix of +1 and -1, over blocks of the largest power of two in head_dim.
inline void hadamard(float* x, int head_dim, float factor) {
    const int block = head_dim & -head_dim;
    for (int i = 0; i < head_dim; i += 16) {
        Floats v = load(x + i);
        v = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v))));
        store(x + i, v * splat(factor));
    }
    for (int step = 16; step < block; step *= 2)
        for (int i = 0; i < head_dim; i += 2 * step)
            for (int j = i; j < i + step; j += 16) {
                const Floats a = load(x + j), b = load(x + j + step);
                store(x + j, a + b);
                store(x + j + step, a - b);
            }
}

inline int doublings(int head_dim) { return __builtin_ctz((unsigned)head_dim); }

[[maybe_unused]] void unrotate(float* x, int head_dim) {
    const int n = doublings(head_dim);
    hadamard(x, head_dim, 1.f / (float)(1 << (n - n / 2)));
}

// Into the Hadamard basis; first rounded so far that the sums are exact, as rotate_exactly does.
inline void rotate_exactly(float* x, int head_dim) {
    const int n = doublings(head_dim), bits = 24 - n;
    float largest = 0;
    for (int i = 0; i < head_dim; i++) {
        const float size = __builtin_fabsf(x[i]);
        if (!(size <= largest)) largest = size;
        if (size != size) break;
    }
    int shift = bits + 126 - (int)(float_to_bits(largest) >> 23);
    shift = shift > 126 ? 126 : shift;
    const float there = bits_to_float((uint32_t)(shift + 127) << 23);
    const float back = bits_to_float((uint32_t)(127 - shift) << 23);
    for (int i = 0; i < head_dim; i += 16) store(x + i, round(load(x + i) * splat(there)));
    hadamard(x, head_dim, 1.f / (float)(1 << n / 2));
    for (int i = 0; i < head_dim; i += 16) store(x + i, load(x + i) * splat(back));
}

constexpr float LARGEST_HALF = 65504.f;

inline uint16_t clamped_half(float x) {
    if (x > LARGEST_HALF) x = LARGEST_HALF;
    if (x < -LARGEST_HALF) x = -LARGEST_HALF;
    return float_to_half(x);
}

inline void encode_i8(const float* y, int head_dim, int8_t* x, uint16_t* scale) {
    float most = 0;
    for (int i = 0; i < head_dim; i++) {
        const float size = __builtin_fabsf(y[i]);
        if (!(size <= most)) most = size;
        if (size != size) break;
    }
    *scale = clamped_half(most / 127.f);
    const float step = half_to_float(*scale);
    for (int i = 0; i < head_dim; i++) {
        float number = step > 0 ? __builtin_rintf(y[i] / step) : 0.f;
        number = number > 127.f ? 127.f : number < -127.f ? -127.f : number;
        x[i] = (int8_t)(number == number ? number : 0.f);
    }
}

inline void encode_u4(const float* y, int head_dim, int group, uint8_t* x, uint16_t* scales,
                      uint16_t* zeros) {
    uint8_t numbers[MOST_HEAD_DIM];
    for (int g = 0, at = 0; at < head_dim; g++, at += group) {
        const int size = head_dim - at < group ? head_dim - at : group;
        float low = y[at], high = y[at];
        for (int i = 1; i < size; i++) {
            low = y[at + i] < low ? y[at + i] : low;
            high = y[at + i] > high ? y[at + i] : high;
        }
        const float step = (high - low) / 15.f;
        double itself = 0, total = 0, dotted = 0;
        for (int i = 0; i < size; i++) {
            float number = step > 0 ? __builtin_rintf((y[at + i] - low) / step) : 0.f;
            number = number > 15.f ? 15.f : number > 0.f ? number : 0.f;
            numbers[at + i] = (uint8_t)number;
            const double wide = y[at + i];
            itself += wide * wide, dotted += wide * number, total += wide;
        }
        const double read_back = step * dotted + low * total;
        const double stretch = read_back > 0 ? itself / read_back : 1.0;
        scales[g] = clamped_half((float)(step * stretch));
        zeros[g] = clamped_half((float)(low * stretch));
        // NaN must stay NaN; the comparisons above let it pass.
        for (int i = 0; i < size; i++)
            if (y[at + i] != y[at + i]) scales[g] = 0x7e00;
    }
    for (int i = 0; i < head_dim / 2; i++)
        x[i] = (uint8_t)(numbers[i] | numbers[i + head_dim / 2] << 4);
}

[[maybe_unused]] void store_token(const HeadPlane& plane, int position, const float* x,
                                  int head_dim) {
    const Place place(plane, position);
    uint8_t* to = place.x(plane);
    if (plane.element == F32) {
        memcpy(to, x, (size_t)head_dim * 4);
        return;
    }
    if (plane.element == BF16) {
        for (int i = 0; i < head_dim; i++) ((uint16_t*)to)[i] = float_to_bf16(x[i]);
        return;
    }
    alignas(64) float y[MOST_HEAD_DIM];
    for (int i = 0; i < head_dim; i++) y[i] = plane.centre ? x[i] - plane.centre[i] : x[i];
    rotate_exactly(y, head_dim);
    const int64_t at = place.scale(plane);
    if (plane.element == I8) encode_i8(y, head_dim, (int8_t*)to, plane.scale + at);
    else encode_u4(y, head_dim, plane.group, to, plane.scale + at, plane.zero + at);
}

// One token of any kind but F32, whose numbers lie at x and whose scales at the place `at`, as floats.
inline void read_token(const HeadPlane& plane, const uint8_t* x, int64_t at, int head_dim, float* out) {
    if (plane.element == BF16) {
        for (int i = 0; i < head_dim; i += 16) store(out + i, load_bf16((const uint16_t*)x + i));
        return;
    }
    if (plane.element == I8) {
        const Floats scale = splat(quick_half(plane.scale[at]));
        for (int i = 0; i < head_dim; i += 16)
            store(out + i, load_i8((const int8_t*)x + i) * scale);
        return;
    }
    const int half = head_dim / 2, shift = __builtin_ctz((unsigned)plane.group);
    const int groups = (head_dim + plane.group - 1) >> shift;
    float scales[LANES], zeros[LANES];
    quick_halves(plane.scale + at, groups, scales);
    quick_halves(plane.zero + at, groups, zeros);
    auto value = [&](Floats number, int channel) {
        const int group = channel >> shift;
        return fma(number, splat(scales[group]), splat(zeros[group]));
    };
    if (half % 16 == 0) {
        for (int i = 0; i < half; i += 16) {
            Floats low, high;
            load_nibbles(x + i, low, high);
            store(out + i, value(low, i));
            store(out + half + i, value(high, half + i));
        }
        return;
    }
    for (int i = 0; i < half; i++) out[i] = (float)(x[i] & 15), out[half + i] = (float)(x[i] >> 4);
    for (int i = 0; i < head_dim; i += 16) store(out + i, value(load(out + i), i));
}

// Where the tokens at `count` positions from `from` on lie, 16 at most, and if asked for their scales; from
// `count` on, the last. FETCH: they come from memory, so what lies a page behind them is fetched.
template <bool FETCH>
inline void find_sixteen(const HeadPlane& plane, int from, int count, int head_dim, const uint8_t** out,
                         int64_t* scales = nullptr) {
    const Place first(plane, from);
    const bool one_block = !plane.ring && first.token + count <= plane.block_size;
    const int64_t size = element_bytes(plane.element);
    const int64_t bytes = plane.element == U4 ? head_dim / 2 : head_dim * size;
    const uint8_t* x = first.x(plane);
    int64_t scale = first.scale(plane);
    for (int i = 0; i < 16; i++) {
        if (i && i < count && one_block) {
            x += plane.token_stride * size, scale += plane.scale_token_stride;
        } else if (i && i < count) {
            const Place place(plane, from + i);
            x = place.x(plane), scale = place.scale(plane);
        }
        out[i] = x;
        if (scales) scales[i] = scale;
        for (int64_t line = 0; FETCH && i < count && line < bytes; line += 64) prefetch(x + AHEAD + line);
    }
}

// The same tokens as floats: where they lie, or in `space`, [16, head_dim].
template <bool FETCH>
inline void read_sixteen(const HeadPlane& plane, int from, int count, int head_dim, float* space,
                         const float** out) {
    if (plane.element == F32)
        return find_sixteen<FETCH>(plane, from, count, head_dim, (const uint8_t**)out);
    const uint8_t* x[16];
    int64_t scales[16];
    find_sixteen<FETCH>(plane, from, count, head_dim, x, scales);
    for (int i = 0; i < 16; i++) {
        out[i] = i < count ? space + i * head_dim : out[count - 1];
        if (i < count) read_token(plane, x[i], scales[i], head_dim, space + i * head_dim);
    }
}

}  // namespace
