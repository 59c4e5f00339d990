// Norms, rounding of activations, rotation, the gate of the MLP and arg-max.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using namespace kvist;

inline void quantise_block(Floats a, Floats b, const Activations& to, int row, int block) {
    if (to.floats) {
        float* out = to.floats + (int64_t)row * to.columns + block * BLOCK;
        store(out, a);
        store(out + 16, b);
        return;
    }
    const int64_t at = to.block_at(row, block);
    const float most = maximum(max(abs(a), abs(b)));
    // A block of zeros, or one too small to divide by, stays zero.
    const float inverse = most > 1e-35f ? 127.f / most : most == most ? 0.f : most;
    int8_t* q = to.q + (int64_t)row * to.columns + block * BLOCK;
    const Floats scaled[2] = {a * splat(inverse), b * splat(inverse)};
    const int32_t total = store_rounded(q, scaled[0], scaled[1]);
    to.scale[at] = most / 127.f;
    to.isum[at] = total;
    to.sum[at] = to.scale[at] * (float)total;
}

[[maybe_unused]] void quantise(const float* x, const Activations& to, int row) {
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK)
        quantise_block(load(x), load(x + 16), to, row, b);
}

// What x is multiplied with to have a mean square of one; `size` is a multiple of 16.
inline float norm_factor(const float* x, float eps, int size) {
    Floats squares = splat(0.f);
    for (int i = 0; i < size; i += 16) squares = fma(load(x + i), load(x + i), squares);
    return 1.f / __builtin_sqrtf(sum(squares) / (float)size + eps);
}

[[maybe_unused]] void norm_quantise(const float* x, const float* weight, float eps,
                                    const Activations& to, int row) {
    const Floats factor = splat(norm_factor(x, eps, to.columns));
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK, weight += BLOCK)
        quantise_block(load(x) * factor * load(weight), load(x + 16) * factor * load(weight + 16),
                       to, row, b);
}

[[maybe_unused]] void norm(float* x, const float* weight, float eps, int size) {
    const Floats factor = splat(norm_factor(x, eps, size));
    for (int i = 0; i < size; i += 16) store(x + i, load(x + i) * factor * load(weight + i));
}

// Pairs (i, i + head_dim / 2); cos_sin: head_dim / 2 cosines, then as many sines.
[[maybe_unused]] void rotate(float* x, const float* cos_sin, int head_dim, float scale) {
    const int half = head_dim / 2;
    const float *cosines = cos_sin, *sines = cos_sin + half;
    if (half % 16) {
        for (int i = 0; i < half; i++) {
            float a = x[i] * scale, b = x[half + i] * scale;
            x[i] = a * cosines[i] - b * sines[i];
            x[half + i] = b * cosines[i] + a * sines[i];
        }
        return;
    }
    for (int i = 0; i < half; i += 16) {
        Floats a = load(x + i) * splat(scale), b = load(x + half + i) * splat(scale);
        Floats c = load(cosines + i), s = load(sines + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
}

// The first of the largest; a NaN is never it.
[[maybe_unused]] int64_t argmax(const float* x, int64_t size) {
    int64_t best = 0, i = 0;
    float most = -__builtin_inff();
    // Most runs of 64 hold no new maximum, and one comparison shows it.
    for (; i + 64 <= size; i += 64) {
        Floats run = max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
        if (!(maximum(run) > most)) continue;
        for (int j = 0; j < 64; j++)
            if (x[i + j] > most) most = x[i + j], best = i + j;
    }
    for (; i < size; i++)
        if (x[i] > most) most = x[i], best = i;
    return best;
}

[[maybe_unused]] bool all_finite(const float* x, int64_t size) {
    Floats zeros = splat(0.f);  // until a number is none, or infinite
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) zeros = fma(load(x + i), splat(0.f), zeros);
    float rest = sum(zeros);
    for (; i < size; i++) rest += x[i] * 0.f;
    return rest == 0.f;
}

}  // namespace
