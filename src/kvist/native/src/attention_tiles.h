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

// A span's keys and values as the second operand of products.
struct SpanTiles {
    // [run][32 channels]: dword [channel / 2][position]
    alignas(64) uint8_t keys[RUNS * MOST_WIDE * TILE_BYTES];
    // [32 positions][16 channels]: dword [position / 2][channel]
    alignas(64) uint8_t values[RUNS / 2 * MOST_NARROW * TILE_BYTES];
};

// 32 channels of a token from `channel` on, rounded, zeros behind the last.
inline __m512i channels_of(const float* token, int channel, int head_dim) {
    const Floats second = channel + 16 < head_dim ? load(token + channel + 16) : splat(0.f);
    return rounded(load(token + channel), second);
}

inline __m512i channels_of(const uint16_t* token, int channel, int head_dim) {
    return channel + 16 < head_dim ? _mm512_loadu_si512(token + channel)
                                   : _mm512_maskz_loadu_epi16(0xffff, token + channel);
}

inline void put_keys(const uint16_t* const* tokens, int head_dim, uint8_t* to) {
    for (int channel = 0; channel < head_dim; channel += 32, to += TILE_BYTES) {
        __m512 v[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) v[i] = (__m512)channels_of(tokens[i], channel, head_dim);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_ps(to + 64 * i, v[i]);
    }
}

// Half of the rows of the tiles of 32 positions.
inline void put_values(const uint16_t* const* tokens, int head_dim, uint8_t* to) {
    alignas(64) static constexpr uint16_t IN_TURN[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(IN_TURN[0]), high = _mm512_load_si512(IN_TURN[1]);
    for (int channel = 0; channel < head_dim; channel += 32, to += 2 * TILE_BYTES)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m512i even = channels_of(tokens[2 * i], channel, head_dim);
            const __m512i odd = channels_of(tokens[2 * i + 1], channel, head_dim);
            _mm512_store_si512(to + 64 * i, _mm512_permutex2var_epi16(even, low, odd));
            if (channel + 16 < head_dim)
                _mm512_store_si512(to + TILE_BYTES + 64 * i, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// Bit i: whether the range holds the position `from` + i, of 16.
inline uint32_t bits_of(const Range& range, int from) {
    const int low = range.begin - from, high = range.end - from;
    const uint32_t below_high = high >= 16 ? 0xffff : high <= 0 ? 0 : (1u << high) - 1;
    return low >= 16 ? 0 : low <= 0 ? below_high : below_high >> low << low;
}

// Up to 16 tokens of few bits: where their numbers, and where their scales lie.
struct Tokens {
    const uint8_t* x[16];
    int64_t at[16];
    int count;
};

// Tokens rounded, `to` [16, head_dim]. HEAD_DIM is that where it is usual, else 0.
template <int HEAD_DIM>
inline void round_i8(const HeadPlane& plane, const Tokens& tokens, int head_dim, uint16_t* to) {
    head_dim = HEAD_DIM ? HEAD_DIM : head_dim;
    for (int i = 0; i < tokens.count; i++, to += head_dim) {
        const int8_t* x = (const int8_t*)tokens.x[i];
        const Floats scale = splat(quick_half(plane.scale[tokens.at[i]]));
#pragma GCC unroll 4
        for (int c = 0; c < head_dim; c += 16)
            _mm256_storeu_si256((__m256i*)(to + c), (__m256i)_mm512_cvtneps_pbh((load_i8(x + c) * scale).v));
    }
}

// Groups are of 32 channels or more. A number chooses from the upper halves of the 16 floats, rounded,
// that it may stand for.
template <int HEAD_DIM>
inline void round_u4(const HeadPlane& plane, const Tokens& tokens, int head_dim, uint16_t* to) {
    head_dim = HEAD_DIM ? HEAD_DIM : head_dim;
    const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi16(1);
    const int shift = __builtin_ctz((unsigned)plane.group);
    const __mmask8 groups = (__mmask8)((1u << ((head_dim + plane.group - 1) >> shift)) - 1);
    alignas(32) float d[16][8], m[16][8];
    for (int i = 0; i < tokens.count; i++) {
        _mm256_store_ps(d[i], _mm256_cvtph_ps(_mm_maskz_loadu_epi16(groups, plane.scale + tokens.at[i])));
        _mm256_store_ps(m[i], _mm256_cvtph_ps(_mm_maskz_loadu_epi16(groups, plane.zero + tokens.at[i])));
    }
    for (int i = 0; i < tokens.count; i++, to += head_dim) {
        auto put = [&](__m512i choice, int at) {
            const __m512 step = _mm512_set1_ps(d[i][at >> shift]), zero = _mm512_set1_ps(m[i][at >> shift]);
            const __m512i table = _mm512_add_epi32((__m512i)_mm512_fmadd_ps(steps, step, zero), half);
            _mm512_storeu_si512(to + at, _mm512_permutexvar_epi16(_mm512_or_si512(choice, upper), table));
        };
#pragma GCC unroll 2
        for (int c = 0; c < head_dim / 2; c += 32) {
            const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(tokens.x[i] + c)));
            put(_mm512_slli_epi16(words, 1), c);
            put(_mm512_srli_epi16(words, 3), head_dim / 2 + c);
        }
    }
}

template <bool FETCH>
inline void round_tokens(const HeadPlane& plane, int from, int count, int head_dim, uint16_t* to) {
    const bool usual = head_dim == 64;
    const bool table = plane.element == U4 && plane.group >= 32 && head_dim % 64 == 0;
    if (plane.element == I8 || table) {
        Tokens tokens{.count = count};
        find_sixteen<FETCH>(plane, from, count, head_dim, tokens.x, tokens.at);
        const auto round = table ? usual ? round_u4<64> : round_u4<0> : usual ? round_i8<64> : round_i8<0>;
        return round(plane, tokens, head_dim, to);
    }
    alignas(64) float space[16 * MOST_HEAD_DIM];
    const float* tokens[16];
    read_sixteen<FETCH>(plane, from, count, head_dim, space, tokens);
    for (int i = 0; i < count; i++)
        for (int c = 0; c < head_dim; c += 16)
            _mm256_storeu_si256((__m256i*)(to + i * head_dim + c),
                                (__m256i)_mm512_cvtneps_pbh(load(tokens[i] + c).v));
}

// Where 16 tokens from a position on lie in bfloat16: in the cache, or rounded in `space`, [16, head_dim].
// Zeros are those whose bit in `wanted` is not set.
template <bool FETCH>
inline void rows_of(const HeadPlane& plane, int from, uint32_t wanted, int head_dim, uint16_t* space,
                    const uint16_t** rows) {
    alignas(64) static const uint16_t zeros[MOST_HEAD_DIM] = {};
    const int count = wanted ? 32 - __builtin_clz(wanted) : 0;
    if (count && plane.element == BF16) {
        find_sixteen<FETCH>(plane, from, count, head_dim, (const uint8_t**)rows);
    } else if (count) {
        round_tokens<FETCH>(plane, from, count, head_dim, space);
        for (int i = 0; i < count; i++) rows[i] = space + i * head_dim;
    }
    for (int i = 0; i < 16 && wanted != 0xffff; i++)
        if (!(wanted >> i & 1)) rows[i] = zeros;
}

// The span's keys as tiles, where `with_keys`, and its values. Where nothing is seen weights are zero,
// and what they meet there has to be finite.
template <bool FETCH>
inline void read_span(const Attention& task, const uint32_t* wanted, bool with_keys, SpanTiles& to) {
    const int head_dim = task.head_dim, wide = (head_dim + 31) / 32, narrow = head_dim / 16;
    alignas(64) uint16_t space[16 * MOST_HEAD_DIM];
    const uint16_t* rows[16];
    for (int run = 0; run < RUNS; run++) {
        const int from = task.begin + 16 * run;
        if (wanted[run] && with_keys) {
            rows_of<FETCH>(task.keys, from, wanted[run], head_dim, space, rows);
            put_keys(rows, head_dim, to.keys + run * wide * TILE_BYTES);
        }
        rows_of<FETCH>(task.values, from, wanted[run], head_dim, space, rows);
        put_values(rows, head_dim, to.values + run / 2 * narrow * TILE_BYTES + run % 2 * (TILE_BYTES / 2));
    }
}

// Queries that a tile of scores has room for, of so many: a few lie close together, [position][query].
inline int across(int queries) { return queries <= 4 ? 4 : 16; }

// 16 positions' scores, [position][across(queries)] -> out [query, SPAN].
inline void turn_scores(const float* sums, int queries, float* out) {
    if (across(queries) == 4) {
        const __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + 16);
        const __m512 c = _mm512_load_ps(sums + 32), d = _mm512_load_ps(sums + 48);
        const __m512i eight = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
        for (int i = 0; i < queries; i++) {
            const __m512i places = _mm512_add_epi32(eight, _mm512_set1_epi32(i));
            _mm512_store_ps(out + i * SPAN, _mm512_mask_blend_ps(0xff00, _mm512_permutex2var_ps(a, places, b),
                                                                 _mm512_permutex2var_ps(c, places, d)));
        }
        return;
    }
    __m512 v[16];
    load_columns(sums, v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < queries) _mm512_store_ps(out + i * SPAN, v[i]);
}

// Scores of up to 16 queries over keys that are the first operand as they lie, in the cache or rounded
// in `space` [SPAN, head_dim]: out [queries, SPAN]. (Tiles are named by literals: sums in 2.)
template <bool FETCH>
inline void multiply_keys_in_place(const Attention& task, const uint32_t* wanted, uint16_t* space,
                                   float* out) {
    const int head_dim = task.head_dim, wide = head_dim / 32, width = across(task.queries);
    alignas(64) uint32_t queries[MOST_WIDE][16 * 16];  // dword [channel / 2][query]
    alignas(64) float sums[RUNS][16 * 16];
    memset(queries, 0, (size_t)wide * sizeof queries[0]);
    for (int i = 0; i < task.queries; i++)
        for (int c = 0; c < wide; c++) {
            alignas(64) uint32_t pairs[16];
            _mm512_store_si512(pairs, channels_of(task.q + i * head_dim, 32 * c, head_dim));
            for (int pair = 0; pair < 16; pair++) queries[c][pair * width + i] = pairs[pair];
        }
    struct {
        const uint16_t* x;
        int64_t stride;
    } keys[RUNS];
    auto multiply = [&](int run) {
        _tile_zero(2);
        for (int c = 0; c < wide; c++) {
            _tile_loadd(5, keys[run].x + 32 * c, keys[run].stride * 2);
            _tile_loadd(6, queries[c], width * 4);
            _tile_dpbf16ps(2, 5, 6);
        }
        _tile_stored(2, sums[run], width * 4);
    };
    // The unit and vectors work in turn, and each change costs: so what has to be rounded is so first.
    const bool at_once = task.keys.element == BF16;
    for (int run = 0; run < RUNS; run++) {
        if (!wanted[run]) continue;
        const uint16_t* rows[16];
        uint16_t* own = space + run * 16 * head_dim;
        rows_of<FETCH>(task.keys, task.begin + 16 * run, wanted[run], head_dim, own, rows);
        keys[run] = {rows[0], rows[1] - rows[0]};
        bool even = true;
        for (int i = 2; i < 16; i++) even &= rows[i] - rows[i - 1] == keys[run].stride;
        for (int i = 0; i < 16 && !even; i++)
            if (rows[i] != own + i * head_dim) memcpy(own + i * head_dim, rows[i], (size_t)head_dim * 2);
        if (!even) keys[run] = {own, head_dim};
        if (at_once) multiply(run);
    }
    for (int run = 0; run < RUNS && !at_once; run++)
        if (wanted[run]) multiply(run);
    for (int run = 0; run < RUNS; run++)
        if (wanted[run]) turn_scores(sums[run], task.queries, out + 16 * run);
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
            _tile_loadd(5, v, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(7, two ? v + TILE_BYTES : v, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out + c * 16, ld * 4);
        if (two) _tile_stored(1, out + c * 16 + 16, ld * 4);
    }
}

// One query's scores -> its weights, rounded, `to` being its row of the first tile of weights; and
// their maximum and sum, as of floats. Zero where it does not see.
inline void weigh_rounded(const float* scores, const __mmask16* masks, uint8_t* to, float* most) {
    const Floats nothing = splat(-__builtin_inff());
    Floats weights[RUNS], top = nothing;
#pragma GCC unroll 8
    for (int run = 0; run < RUNS; run++) {
        weights[run] = {_mm512_mask_loadu_ps(nothing.v, masks[run], scores + 16 * run)};
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

template <bool FETCH> inline void attend_span(const Attention& task) {
    const int head_dim = task.head_dim, wide = (head_dim + 31) / 32, narrow = head_dim / 16;
    const int rows = least(task.queries, ROW_TILE), tiles = (task.queries + ROW_TILE - 1) / ROW_TILE;
    const int64_t ld = part_record(head_dim);
    constexpr int TILES = MOST_TOGETHER / ROW_TILE;
    SpanTiles span;
    alignas(64) uint8_t queries[TILES * MOST_WIDE * TILE_BYTES], weights[TILES * RUNS / 2 * TILE_BYTES];
    alignas(64) float scores[MOST_TOGETHER * SPAN], spare[ROW_TILE * (MOST_HEAD_DIM + 16)];
    const Seen seen = seen_by(task, 0, task.queries);
    uint32_t wanted[RUNS];
    Range runs{RUNS, 0};  // between which all lies that some query sees
    for (int run = 0; run < RUNS; run++) {
        const int from = task.begin + 16 * run;
        wanted[run] = bits_of(seen.ranges[0], from) | bits_of(seen.ranges[1], from);
        if (wanted[run]) runs = {runs.end ? runs.begin : run, run + 1};
    }
    // Keys of few queries are not worth to be turned round.
    const bool in_place = tiles == 1 && head_dim % 32 == 0;
    read_span<FETCH>(task, wanted, !in_place, span);
    TileShapes shapes;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = (uint8_t)rows;
    if (in_place) shapes.bytes_per_row[2] = shapes.bytes_per_row[6] = (uint16_t)(across(rows) * 4);
    const Tiles unit(shapes);
    // The unit and vectors work in turn, and each change costs: so all tiles take a step together.
    if (in_place) {
        multiply_keys_in_place<FETCH>(task, wanted, (uint16_t*)span.keys, scores);
    } else {
        for (int i = 0; i < task.queries; i++)
            for (int c = 0; c < wide; c++)
                _mm512_store_si512(queries + (i / ROW_TILE * wide + c) * TILE_BYTES + i % ROW_TILE * 64,
                                   channels_of(task.q + i * head_dim, 32 * c, head_dim));
        for (int i = 0; i < tiles; i++)
            multiply_keys(queries + i * wide * TILE_BYTES, span.keys, wide, runs,
                          scores + i * ROW_TILE * SPAN);
    }
    __mmask16 masks[RUNS];
    for (int i = 0; i < task.queries; i++) {
        if (!i || task.first[i] != task.first[i - 1] || task.last[i] != task.last[i - 1]) {
            const Range own[2] = {{task.begin, least(seen.sinks, task.last[i])}, {task.first[i], task.last[i]}};
            for (int run = 0; run < RUNS; run++)
                masks[run] = (__mmask16)(bits_of(own[0], task.begin + 16 * run) | bits_of(own[1], task.begin + 16 * run));
        }
        weigh_rounded(scores + i * SPAN, masks,
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

void attend_on_tiles(const Attention& task) {
    if (task.fetch) attend_span<true>(task);
    else attend_span<false>(task);
}

}  // namespace
