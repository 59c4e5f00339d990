// Attention of some queries over one span on matrix units (AMX).
//
// Queries, keys, values and weights are rounded to bfloat16, whatever the cache holds; scores, softmax
// and sums are float32. A query is a row of its tiles, and rows do not meet, so its bits are the same
// alone and among others.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace {

constexpr int RUNS = SPAN / 16;  // of positions that a tile of keys has
constexpr int MOST_TOGETHER = 64;  // queries
constexpr int MOST_WIDE = MOST_HEAD_DIM / 32, MOST_NARROW = MOST_HEAD_DIM / 16;

inline int least(int a, int b) { return a < b ? a : b; }

// A span's keys and values as the second operand of products.
struct SpanTiles {
    // [run][32 channels]: dword [channel / 2][position]
    alignas(64) uint8_t keys[RUNS * MOST_WIDE * TILE_BYTES];
    // [32 positions][16 channels]: dword [position / 2][channel]
    alignas(64) uint8_t values[RUNS / 2 * MOST_NARROW * TILE_BYTES];
};

// 32 channels of a token from `channel` on, zeros behind the last.
inline __m512i rounded_channels(const float* token, int channel, int head_dim) {
    const Floats second = channel + 16 < head_dim ? load(token + channel + 16) : splat(0.f);
    return rounded(load(token + channel), second);
}

inline void put_keys(const float* const* tokens, int head_dim, uint8_t* to) {
    for (int channel = 0; channel < head_dim; channel += 32, to += TILE_BYTES) {
        __m512 v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) v[i] = (__m512)rounded_channels(tokens[i], channel, head_dim);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_ps(to + 64 * i, v[i]);
    }
}

// Half of the rows of the tiles of 32 positions.
inline void put_values(const float* const* tokens, int head_dim, uint8_t* to) {
    for (int channel = 0; channel < head_dim; channel += 16, to += TILE_BYTES)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            _mm512_store_si512(to + 64 * i, rounded_pairs(load(tokens[2 * i] + channel),
                                                          load(tokens[2 * i + 1] + channel)));
}

// Bit i: whether the range holds the position `from` + i, of 16.
inline uint32_t bits_of(const Range& range, int from) {
    const int low = range.begin - from, high = range.end - from;
    const uint32_t below_high = high >= 16 ? 0xffff : high <= 0 ? 0 : (1u << high) - 1;
    return low >= 16 ? 0 : low <= 0 ? below_high : below_high >> low << low;
}

// The span's tiles; returns the runs between which all lies that some query sees.
template <bool FETCH>
inline Range read_span(const Attention& task, const Seen& seen, SpanTiles& to) {
    const int head_dim = task.head_dim, wide = (head_dim + 31) / 32, narrow = head_dim / 16;
    alignas(64) float space[16 * MOST_HEAD_DIM];
    alignas(64) static const float zeros[MOST_HEAD_DIM] = {};
    const float* tokens[16];
    Range runs{RUNS, 0};
    for (int run = 0; run < RUNS; run++) {
        const int from = task.begin + 16 * run;
        const uint32_t wanted = bits_of(seen.ranges[0], from) | bits_of(seen.ranges[1], from);
        if (wanted) {
            const int count = 32 - __builtin_clz(wanted);
            runs = {runs.end ? runs.begin : run, run + 1};
            read_sixteen<FETCH>(task.keys, from, count, head_dim, space, tokens);
            put_keys(tokens, head_dim, to.keys + run * wide * TILE_BYTES);
            read_sixteen<FETCH>(task.values, from, count, head_dim, space, tokens);
        }
        // Weights are zero where nothing is seen; what they meet there has to be finite.
        for (int i = 0; i < 16 && wanted != 0xffff; i++)
            if (!(wanted >> i & 1)) tokens[i] = zeros;
        put_values(tokens, head_dim, to.values + run / 2 * narrow * TILE_BYTES + run % 2 * (TILE_BYTES / 2));
    }
    return runs;
}

// Scores of a tile of queries: out [16, SPAN]. (Tiles are named by literals: sums in 0 to 3.)
inline void multiply_keys(const uint8_t* queries, const uint8_t* keys, int wide, Range runs, float* out) {
    constexpr int LD = SPAN * 4;
    for (int run = runs.begin; run < runs.end; run += 2) {
        const bool two = run + 1 < runs.end;
        const uint8_t* first = keys + run * wide * TILE_BYTES;
        const uint8_t* second = two ? first + wide * TILE_BYTES : first;
        _tile_zero(0);
        _tile_zero(1);
        for (int c = 0; c < wide; c++) {
            _tile_loadd(4, queries + c * TILE_BYTES, 64);
            _tile_loadd(6, first + c * TILE_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, second + c * TILE_BYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out + run * 16, LD);
        if (two) _tile_stored(1, out + run * 16 + 16, LD);
    }
}

// Weights [16, 32] of each two runs times their values: out [16, head_dim], `ld` floats a row.
inline void multiply_values(const uint8_t* weights, const uint8_t* values, int narrow, Range runs,
                            float* out, int64_t ld) {
    const int first = runs.begin / 2, end = (runs.end + 1) / 2;
    for (int c = 0; c < narrow; c += 2) {
        const bool two = c + 1 < narrow;
        _tile_zero(0);
        _tile_zero(1);
        for (int i = first; i < end; i++) {
            const uint8_t* v = values + (i * narrow + c) * TILE_BYTES;
            _tile_loadd(4, weights + i * TILE_BYTES, 64);
            _tile_loadd(6, v, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, two ? v + TILE_BYTES : v, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out + c * 16, ld * 4);
        if (two) _tile_stored(1, out + c * 16 + 16, ld * 4);
    }
}

// One query's scores -> its weights, rounded, `to` being its row of the first tile of weights; and
// their maximum and sum, as of floats. Zero where it does not see.
inline void weigh_rounded(const float* scores, const Range (&seen)[2], int begin, uint8_t* to, float* most) {
    const Floats nothing = splat(-__builtin_inff());
    Floats weights[RUNS], top = nothing;
#pragma GCC unroll 8
    for (int run = 0; run < RUNS; run++) {
        const __mmask16 mask =
            (__mmask16)(bits_of(seen[0], begin + 16 * run) | bits_of(seen[1], begin + 16 * run));
        weights[run] = {_mm512_mask_loadu_ps(nothing.v, mask, scores + 16 * run)};
        top = max(top, weights[run]);
    }
    const float m = maximum(top);
    const bool none = m == -__builtin_inff();
    Floats total = splat(0.f);
#pragma GCC unroll 8
    for (int run = 0; run < RUNS; run++) {
        weights[run] = none ? splat(0.f)
                            : where_seen(weights[run], exponential(weights[run] - splat(m)));
        total = total + weights[run];
    }
#pragma GCC unroll 4
    for (int i = 0; i < RUNS / 2; i++)
        _mm512_store_si512(to + i * TILE_BYTES, rounded(weights[2 * i], weights[2 * i + 1]));
    most[0] = m, most[1] = sum(total);
}

void attend_on_tiles(const Attention& task) {
    const int head_dim = task.head_dim, wide = (head_dim + 31) / 32, narrow = head_dim / 16;
    const int rows = task.queries < ROW_TILE ? task.queries : ROW_TILE;
    const int64_t ld = part_record(head_dim);
    SpanTiles span;
    constexpr int TILES = MOST_TOGETHER / ROW_TILE;
    alignas(64) uint8_t queries[TILES * MOST_WIDE * TILE_BYTES], weights[TILES * RUNS / 2 * TILE_BYTES];
    alignas(64) float scores[MOST_TOGETHER * SPAN], spare[ROW_TILE * (MOST_HEAD_DIM + 16)];
    const Seen seen = seen_by(task, 0, task.queries);
    const Range runs = task.fetch ? read_span<true>(task, seen, span) : read_span<false>(task, seen, span);
    for (int i = 0; i < task.queries; i++)
        for (int c = 0; c < wide; c++)
            _mm512_store_si512(queries + (i / ROW_TILE * wide + c) * TILE_BYTES + i % ROW_TILE * 64,
                               rounded_channels(task.q + i * head_dim, 32 * c, head_dim));
    TileShapes shapes;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = (uint8_t)rows;
    const Tiles unit(shapes);
    // The unit and vectors work in turn, and each change costs: so all tiles take a step together.
    const int tiles = (task.queries + ROW_TILE - 1) / ROW_TILE;
    for (int i = 0; i < tiles; i++)
        multiply_keys(queries + i * wide * TILE_BYTES, span.keys, wide, runs, scores + i * ROW_TILE * SPAN);
    for (int i = 0; i < task.queries; i++) {
        const Range own[2] = {{task.begin, least(seen.sinks, task.last[i])}, {task.first[i], task.last[i]}};
        weigh_rounded(scores + i * SPAN, own, task.begin,
                      weights + i / ROW_TILE * (RUNS / 2) * TILE_BYTES + i % ROW_TILE * 64,
                      task.out + i * ld + head_dim);
    }
    for (int i = 0; i < tiles; i++) {
        const uint8_t* from = weights + i * (RUNS / 2) * TILE_BYTES;
        float* to = task.out + i * ROW_TILE * ld;
        // The unit writes whole tiles: where the last has fewer rows to go to, beside.
        const int count = least(task.queries - i * ROW_TILE, rows);
        multiply_values(from, span.values, narrow, runs, count == rows ? to : spare, ld);
        for (int r = 0; r < count && count < rows; r++)
            memcpy(to + r * ld, spare + r * ld, (size_t)head_dim * 4);
    }
}

}  // namespace
