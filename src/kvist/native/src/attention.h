// Attention of a few queries over one head of the cache, read in place where the layout put it.
//
// Sixteen positions at a time: their products with each query are summed lane by lane and turned
// around by one tree of additions, so that keys need no transposed copy. Scores are kept, so the
// softmax is taken in one pass between keys and values.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using namespace kvist;

template <typename T> inline Floats load_element(const T* p);
template <> inline Floats load_element(const float* p) { return load(p); }
template <> inline Floats load_element(const uint16_t* p) { return load_bf16(p); }

inline int64_t place(const HeadPlane& plane, int position) {
    int block = position / plane.block_size;
    return plane.table[block] * plane.block_stride +
           (position - block * plane.block_size) * plane.token_stride;
}

// Where each of the positions [from, from + 16) lies; those from `end` on repeat the last.
template <typename T>
inline void sixteen_places(const HeadPlane& plane, int from, int end, const T** out) {
    const T* base = (const T*)plane.base;
    const int last = end - 1 < from + 15 ? end - 1 : from + 15;
    if (from / plane.block_size == last / plane.block_size) {  // one block: a plain stride
        const T* start = base + place(plane, from);
        for (int i = 0; i < 16; i++)
            out[i] = start + (from + i < last ? i : last - from) * plane.token_stride;
    } else {
        for (int i = 0; i < 16; i++) out[i] = base + place(plane, from + i < last ? from + i : last);
    }
}

// A run of a token's elements that a page ahead is fetched for.
template <typename T> inline void fetch_ahead(const T* token, int head_dim) {
    for (int i = 0; i < head_dim; i += 64 / (int)sizeof(T))
        prefetch((const char*)(token + i) + 4096);
}

// VECTORS is head_dim / 16 where that is usual, so that the queries stay in registers; else 0.
template <typename T, int QUERIES, int VECTORS>
inline void score_sixteen(const T* const* keys, const float* q, int head_dim, float* scores,
                          int64_t ld) {
    const int vectors = VECTORS ? VECTORS : head_dim / 16;
    Floats products[QUERIES][16];
    for (int i = 0; i < 16; i++) {
        fetch_ahead(keys[i], 16 * vectors);
        Floats acc[QUERIES];
        for (int g = 0; g < QUERIES; g++) acc[g] = splat(0.f);
#pragma GCC unroll 8
        for (int d = 0; d < vectors; d++) {
            const Floats k = load_element<T>(keys[i] + 16 * d);
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++)
                acc[g] = fma(k, load(q + g * 16 * vectors + 16 * d), acc[g]);
        }
        for (int g = 0; g < QUERIES; g++) products[g][i] = acc[g];
    }
    for (int g = 0; g < QUERIES; g++) store(scores + g * ld, sums_of(products[g]));
}

// out[g] = sum of weights[g] * value, for 64 channels or fewer at a time.
template <typename T, int QUERIES, int VECTORS>
inline void mix(const HeadPlane& plane, int channel, int first, int end, const float* weights,
                int64_t ld, float* out, int head_dim) {
    Floats acc[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int d = 0; d < VECTORS; d++) acc[g][d] = splat(0.f);
    const T* values[16];
    for (int p = first; p < end; p += 16) {
        sixteen_places(plane, p, end, values);
        const int count = end - p < 16 ? end - p : 16;
        for (int i = 0; i < count; i++) {
            const T* v = values[i] + channel;
            fetch_ahead(v, VECTORS * 16);
            Floats vectors[VECTORS];
            for (int d = 0; d < VECTORS; d++) vectors[d] = load_element<T>(v + 16 * d);
            for (int g = 0; g < QUERIES; g++) {
                Floats w = splat(weights[g * ld + (p - first) + i]);
                for (int d = 0; d < VECTORS; d++) acc[g][d] = fma(w, vectors[d], acc[g][d]);
            }
        }
    }
    for (int g = 0; g < QUERIES; g++)
        for (int d = 0; d < VECTORS; d++) store(out + g * head_dim + channel + 16 * d, acc[g][d]);
}

// Scores -> exp(score - max) in place; places behind the range become zero.
inline void soften(float* scores, int count, float* most, float* weight) {
    const int whole = count / 16 * 16;
    Floats top = splat(-__builtin_inff());
    for (int i = 0; i < whole; i += 16) top = max(top, load(scores + i));
    float m = maximum(top);
    for (int i = whole; i < count; i++) m = scores[i] > m ? scores[i] : m;
    for (int i = count; i < whole + 16; i++) scores[i] = -__builtin_inff();
    Floats total = splat(0.f);
    for (int i = 0; i < count; i += 16) {
        Floats e = exponential(load(scores + i) - splat(m));
        store(scores + i, e);
        if (i + 16 > count) {
            for (int j = count; j < i + 16; j++) scores[j] = 0.f;
            e = load(scores + i);
        }
        total = total + e;
    }
    *most = m, *weight = sum(total);
}

template <typename T, int QUERIES> inline void attend_together(const Attention& task, int query) {
    const int head_dim = task.head_dim, count = task.end - task.first;
    const int64_t ld = (count + 31) / 16 * 16;
    const float* q = task.q + query * head_dim;
    const T* keys[16];
    for (int p = task.first; p < task.end; p += 16) {
        sixteen_places(task.keys, p, task.end, keys);
        float* scores = task.scores + (p - task.first);
        if (head_dim == 64) score_sixteen<T, QUERIES, 4>(keys, q, head_dim, scores, ld);
        else score_sixteen<T, QUERIES, 0>(keys, q, head_dim, scores, ld);
    }
    for (int g = 0; g < QUERIES; g++)
        soften(task.scores + g * ld, count, task.max + query + g, task.weight + query + g);
    float* out = task.out + query * head_dim;
    int channel = 0;
    for (; channel + 64 <= head_dim; channel += 64)
        mix<T, QUERIES, 4>(task.values, channel, task.first, task.end, task.scores, ld, out, head_dim);
    for (; channel < head_dim; channel += 16)
        mix<T, QUERIES, 1>(task.values, channel, task.first, task.end, task.scores, ld, out, head_dim);
}

template <typename T> inline void attend_all(const Attention& task) {
    int query = 0;
    for (; query + 4 <= task.queries; query += 4) attend_together<T, 4>(task, query);
    switch (task.queries - query) {
        case 3: return attend_together<T, 3>(task, query);
        case 2: return attend_together<T, 2>(task, query);
        case 1: return attend_together<T, 1>(task, query);
        default: return;
    }
}

void attend(const Attention& task) {
    if (task.keys.element == F32) attend_all<float>(task);
    else attend_all<uint16_t>(task);
}

void merge(const float* const* parts, const float* max, const float* weight, int count,
           int head_dim, float* out) {
    float most = max[0], total = 0;
    for (int i = 1; i < count; i++) most = max[i] > most ? max[i] : most;
    for (int i = 0; i < count; i++) total += weight[i] * __builtin_expf(max[i] - most);
    for (int d = 0; d < head_dim; d += 16) {
        Floats mixed = splat(0.f);
        for (int i = 0; i < count; i++)
            mixed = fma(splat(__builtin_expf(max[i] - most) / total), load(parts[i] + d), mixed);
        store(out + d, mixed);
    }
}

void store_token(const HeadPlane& plane, int position, const float* x, int head_dim) {
    const int64_t at = place(plane, position);
    if (plane.element == F32) {
        memcpy((float*)plane.base + at, x, (size_t)head_dim * 4);
    } else {
        uint16_t* to = (uint16_t*)plane.base + at;
        for (int i = 0; i < head_dim; i++) to[i] = float_to_bf16(x[i]);
    }
}

}  // namespace
