// Attention of some queries over one span of one head of the cache, read in place.
//
// Sixteen positions at a time: their products with each query are summed lane by lane and turned
// around by one tree of additions, so that keys need no transposed copy. A span's scores fit the
// nearest cache, so the softmax is taken in one pass between keys and values.
#pragma once
#include "kernels.h"
#include "planes.h"
#include "simd.h"

namespace {

using namespace kvist;

constexpr int TOGETHER = 12;  // queries that share one reading of the span

// Positions that some query sees: ascending, at most two ranges.
struct Range {
    int begin, end;
};

// VECTORS is head_dim / 16 where that is usual, so that the queries stay in registers; else 0.
template <int QUERIES, int VECTORS>
inline void score_sixteen(const float* const* keys, const float* q, int head_dim, float* scores) {
    const int vectors = VECTORS ? VECTORS : head_dim / 16;
    Floats products[QUERIES][16];
    for (int i = 0; i < 16; i++) {
        Floats acc[QUERIES];
        for (int g = 0; g < QUERIES; g++) acc[g] = splat(0.f);
#pragma GCC unroll 8
        for (int d = 0; d < vectors; d++) {
            const Floats k = load(keys[i] + 16 * d);
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++)
                acc[g] = fma(k, load(q + (g * vectors + d) * 16), acc[g]);
        }
        for (int g = 0; g < QUERIES; g++) products[g][i] = acc[g];
    }
    for (int g = 0; g < QUERIES; g++) store(scores + g * SPAN, sums_of(products[g]));
}

template <int VECTORS>
inline void score_all(const float* const* keys, const float* q, int queries, int head_dim,
                      float* scores) {
    for (; queries >= 4; queries -= 4, q += 4 * head_dim, scores += 4 * SPAN)
        score_sixteen<4, VECTORS>(keys, q, head_dim, scores);
    switch (queries) {
        case 3: return score_sixteen<3, VECTORS>(keys, q, head_dim, scores);
        case 2: return score_sixteen<2, VECTORS>(keys, q, head_dim, scores);
        case 1: return score_sixteen<1, VECTORS>(keys, q, head_dim, scores);
        default: return;
    }
}

// out[g] += sum over count positions of weights[g] * value, for 16 * VECTORS channels.
template <int QUERIES, int VECTORS>
inline void mix_sixteen(const float* const* values, int count, const float* weights, float* out,
                        int64_t ld) {
    Floats acc[QUERIES][VECTORS];
    for (int g = 0; g < QUERIES; g++)
        for (int d = 0; d < VECTORS; d++) acc[g][d] = load(out + g * ld + 16 * d);
    for (int i = 0; i < count; i++) {
        Floats v[VECTORS];
        for (int d = 0; d < VECTORS; d++) v[d] = load(values[i] + 16 * d);
#pragma GCC unroll 6
        for (int g = 0; g < QUERIES; g++) {
            const Floats w = splat(weights[g * SPAN + i]);
            for (int d = 0; d < VECTORS; d++) acc[g][d] = fma(w, v[d], acc[g][d]);
        }
    }
    for (int g = 0; g < QUERIES; g++)
        for (int d = 0; d < VECTORS; d++) store(out + g * ld + 16 * d, acc[g][d]);
}

template <int VECTORS>
inline void mix_all(const float* const* values, int count, const float* weights, float* out,
                    int queries, int64_t ld) {
    constexpr int MOST = VECTORS == 4 ? 6 : 4;
    for (; queries >= MOST; queries -= MOST, weights += MOST * SPAN, out += MOST * ld)
        mix_sixteen<MOST, VECTORS>(values, count, weights, out, ld);
    switch (queries) {
        case 5: return mix_sixteen<5, VECTORS>(values, count, weights, out, ld);
        case 4: return mix_sixteen<4, VECTORS>(values, count, weights, out, ld);
        case 3: return mix_sixteen<3, VECTORS>(values, count, weights, out, ld);
        case 2: return mix_sixteen<2, VECTORS>(values, count, weights, out, ld);
        case 1: return mix_sixteen<1, VECTORS>(values, count, weights, out, ld);
        default: return;
    }
}

// Scores of a span -> exp(score - max) in place, zero where a query does not see.
inline void soften(float* scores, float* most, float* weight) {
    Floats top = splat(-__builtin_inff());
    for (int i = 0; i < SPAN; i += 16) top = max(top, load(scores + i));
    const float m = maximum(top);
    *most = m, *weight = 0;
    if (m == -__builtin_inff()) {
        for (int i = 0; i < SPAN; i += 16) store(scores + i, splat(0.f));
        return;
    }
    Floats total = splat(0.f);
    for (int i = 0; i < SPAN; i += 16) {
        const Floats score = load(scores + i);
        const Floats e = where_seen(score, exponential(score - splat(m)));
        store(scores + i, e);
        total = total + e;
    }
    *weight = sum(total);
}

inline void hide(float* scores, int begin, int end) {
    end = end < SPAN ? end : SPAN;
    for (int i = begin > 0 ? begin : 0; i < end; i++) scores[i] = -__builtin_inff();
}

// What any of some queries sees of a span: its sinks, and the rest.
struct Seen {
    Range ranges[2];
    int sinks;
};

inline Seen seen_by(const Attention& task, int query, int queries) {
    int first = task.end, last = task.begin;
    for (int g = query; g < query + queries; g++) {
        first = task.first[g] < first ? task.first[g] : first;
        last = task.last[g] > last ? task.last[g] : last;
    }
    const int sinks = task.sinks < task.end ? task.sinks : task.end;
    Seen seen{{{task.begin, sinks < last ? sinks : last},
               {first > task.begin ? first : task.begin, last < task.end ? last : task.end}},
              sinks};
    if (seen.ranges[1].begin < seen.ranges[0].end) seen.ranges[1].begin = seen.ranges[0].end;
    return seen;
}

// Scores of one query -> weights, behind them their maximum and sum; zero where it does not see.
inline void weigh(const Attention& task, int query, int sinks, float* scores, float* most) {
    const int own_sinks = sinks < task.last[query] ? sinks : task.last[query];
    hide(scores, own_sinks - task.begin, task.first[query] - task.begin);
    hide(scores, task.last[query] - task.begin, SPAN);
    soften(scores, most, most + 1);
}

template <bool FETCH> inline void attend_together(const Attention& task, int query, int queries) {
    const int head_dim = task.head_dim;
    alignas(64) float scores[TOGETHER * SPAN + 16], space[16 * MOST_HEAD_DIM];
    const float* tokens[16];
    const Seen seen = seen_by(task, query, queries);
    const float* q = task.q + query * head_dim;
    const int64_t ld = part_record(head_dim);
    float* out = task.out + query * ld;
    for (const Range& range : seen.ranges)
        // From a whole run on: what lies before the range is there to be read, and hidden below.
        for (int p = range.begin / 16 * 16; p < range.end; p += 16) {
            const int count = range.end - p < 16 ? range.end - p : 16;
            read_sixteen<FETCH>(task.keys, p, count, head_dim, space, tokens);
            float* to = scores + (p - task.begin);
            if (head_dim == 64) score_all<4>(tokens, q, queries, head_dim, to);
            else score_all<0>(tokens, q, queries, head_dim, to);
        }
    for (int g = 0; g < queries; g++) {
        weigh(task, query + g, seen.sinks, scores + g * SPAN, out + g * ld + head_dim);
        memset(out + g * ld, 0, (size_t)head_dim * 4);
    }
    for (const Range& range : seen.ranges)
        for (int p = range.begin; p < range.end; p += 16) {
            const int count = range.end - p < 16 ? range.end - p : 16;
            read_sixteen<FETCH>(task.values, p, count, head_dim, space, tokens);
            const float* weights = scores + (p - task.begin);
            int channel = 0;
            for (; channel + 64 <= head_dim; channel += 64) {
                mix_all<4>(tokens, count, weights, out + channel, queries, ld);
                for (const float*& token : tokens) token += 64;
            }
            for (; channel < head_dim; channel += 16) {
                mix_all<1>(tokens, count, weights, out + channel, queries, ld);
                for (const float*& token : tokens) token += 16;
            }
        }
}

[[maybe_unused]] void attend(const Attention& task) {
    for (int query = 0; query < task.queries; query += TOGETHER) {
        const int left = task.queries - query, queries = left < TOGETHER ? left : TOGETHER;
        // Many queries find in the cache what those before them read.
        if (task.fetch) attend_together<true>(task, query, queries);
        else attend_together<false>(task, query, queries);
    }
}

[[maybe_unused]] void merge(const float* parts, int64_t stride, int count, int head_dim, float* out) {
    const float *max = parts + head_dim, *weight = max + 1;
    float most = *max, total = 0;
    for (int i = 1; i < count; i++) {
        const float m = max[i * stride];
        most = m > most || m != m ? m : most;
    }
    for (int d = 0; d < head_dim; d += 16) store(out + d, splat(0.f));
    for (int from = 0; from < count; from += 16) {  // spans, 16 at a time
        alignas(64) float factors[16];
        const int end = count - from < 16 ? count - from : 16;
        for (int i = 0; i < 16; i++) factors[i] = i < end ? max[(from + i) * stride] : most;
        store(factors, exponential(load(factors) - splat(most)));
        for (int i = 0; i < end; i++) {
            const float* part = parts + (from + i) * stride;
            total += weight[(from + i) * stride] * factors[i];
            for (int d = 0; d < head_dim; d += 16)
                store(out + d, fma(splat(factors[i]), load(part + d), load(out + d)));
        }
    }
    const Floats share = splat(1.f / total);
    for (int d = 0; d < head_dim; d += 16) store(out + d, load(out + d) * share);
}

}  // namespace
