// Quantised weights on matrix units (AMX), for one row and for many.
//
// Weights are spread out to bfloat16, activations rounded to it, sums are float32. The unit adds up
// blocks of 32 products in one order, whatever stands in the other columns of its tiles: a row's bits
// do not depend on the rows beside it, nor on how many tiles of rows meet a tile of weights.
//
// A block of a group of weights is one operand: 16 rows, 64 bytes each. Activations are the other: a
// tile holds 16 rows of them, dword [column / 2][row] being two columns. So products come out with the
// group's rows down and the activations' across.
#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "attention_tiles.h"
#include "linear.h"
#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int CHUNK = 3;  // blocks that are spread out before the unit meets them
constexpr float CUT = 0x1p-8f * 0.7213475f;  // the mean of 1 / m is that, where log m is even in [1, 2)

// Bytes from one pair of columns to the next. A lone row's stand side by side, for a dword in each of
// many cache lines would leave the first cache no room for weights. (Loads of 2 to 8 rows side by side
// are slower than that.)
inline int pitch_of(const Activations& x) { return x.lone ? 4 : 64; }

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations: one column of them, or 16.
TileShapes shapes_for(int rows) {
    TileShapes shapes;
    if (rows > 1) return shapes;
    for (int tile = 0; tile < 8; tile++)
        if (tile != 4 && tile != 5) shapes.bytes_per_row[tile] = 4;
    return shapes;
}

// Read from memory from here on: loads spread a value over all lanes for nothing, shuffles do not.
template <typename Values> inline void in_memory(Values& values) { asm("" : "+m"(values)); }

// A block of a group -> 16 rows of 32 bfloat16. A nibble chooses from the upper halves of the 16 floats
// that it may stand for. What is cut off is not rounded but made up for on average, in their scale: the
// lower half is 2^-8 of a float's power of two on average, which is CUT of the float itself.
inline void scales_of_q4(const uint8_t* w, float* to) {
    store(to, load_half(w + 256) * splat(1 + CUT));
    store(to + LANES, load_half(w + 288) * splat(1 + CUT));
}

inline void spread_q4(const uint8_t* w, const float* scales, uint8_t* to) {
    const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // A choice is 5 bits, the lowest set. It is the next nibble's highest, so each second is set at a time.
    const __m512i even = _mm512_set1_epi16(0x0101), odd = _mm512_set1_epi16(0x1010);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
        const __m512i words = _mm512_loadu_si512(w + 64 * v);
        const __m512i first = _mm512_or_si512(words, even), second = _mm512_or_si512(words, odd);
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            const int r = 4 * v + t;
            const __m512 table =
                _mm512_fmadd_ps(steps, _mm512_set1_ps(scales[r]), _mm512_set1_ps(scales[LANES + r]));
            const __m512i choice = t == 0   ? first
                                   : t == 1 ? _mm512_srli_epi16(second, 4)
                                   : t == 2 ? _mm512_srli_epi16(first, 8)
                                            : _mm512_shldi_epi16(second, second, 4);
            _mm512_store_si512(to + 64 * r, _mm512_permutexvar_epi16(choice, (__m512i)table));
        }
    }
}

inline void scales_of_q8(const uint8_t* w, float* to) { store(to, load_half(w + 512)); }

inline void spread_q8(const uint8_t* w, const float* scales, uint8_t* to) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
        const int8_t* q = (const int8_t*)w + 32 * r;
        const Floats scale = splat(scales[r]);
        _mm512_store_si512(to + 64 * r, (__m512i)_mm512_cvtne2ps_pbh((load_i8(q + 16) * scale).v,
                                                                     (load_i8(q) * scale).v));
    }
}

template <Kind KIND> constexpr int BYTES = KIND == Q4 ? Q4_BLOCK : Q8_BLOCK;

// Two groups that the unit meets together.
struct Groups {
    const uint8_t* w;
    int64_t stride;  // from one to the other
    const uint8_t* next;  // what will be read after them, in the same order

    template <Kind KIND> const uint8_t* block(int b, int g) const { return w + g * stride + b * BYTES<KIND>; }
};

// Blocks [begin, end) of both, CHUNK at most -> tiles [block][group]. Scales are all made before they are
// used: loads right behind the stores of the same bytes would wait for them.
template <Kind KIND> inline void spread_chunk(const Groups& groups, int begin, int end, uint8_t* to) {
    alignas(64) float scales[CHUNK][2][2 * LANES];
    for (int b = begin; b < end; b++)
        for (int g = 0; g < 2; g++)
            (KIND == Q4 ? scales_of_q4 : scales_of_q8)(groups.block<KIND>(b, g), scales[b - begin][g]);
    in_memory(scales);
    for (int b = begin; b < end; b++)
        for (int g = 0; g < 2; g++, to += TILE_BYTES) {
            const uint8_t* w = groups.block<KIND>(b, g);
            // What comes in this place the next time, into the second cache; what comes soon, into the first.
            for (int i = 0; i < BYTES<KIND>; i += 64) {
                _mm_prefetch((const char*)groups.next + (w - groups.w) + i, _MM_HINT_T1);
                _mm_prefetch((const char*)w + 3 * BYTES<KIND> + i, _MM_HINT_T0);
            }
            (KIND == Q4 ? spread_q4 : spread_q8)(w, scales[b - begin][g], to);
        }
}

inline uint8_t* tile_of(const Activations& x, int row, int block) {
    const int64_t tile = (int64_t)(row / ROW_TILE) * (x.columns / BLOCK) + block;
    return (uint8_t*)x.tiles + tile * (BLOCK / 2) * pitch_of(x);
}

// Sums of two groups and of one or two tiles of rows go on over a block.
template <int TILES>
inline void multiply(const uint8_t* weights, const Activations& x, int row, int block) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, tile_of(x, row, block), pitch_of(x));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, weights + TILE_BYTES, 64);
    _tile_dpbf16ps(1, 5, 6);
    if (TILES == 1) return;
    _tile_loadd(7, tile_of(x, row + ROW_TILE, block), 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Sums of two groups, [lane][row] of each: two for one tile of rows, then two for the next.
struct Sums {
    alignas(64) float tiles[4][256];

    void take(int rows, bool one) {  // one: of all
        const int64_t ld = one ? 4 : 64;
        _tile_stored(0, tiles[0], ld);
        _tile_stored(1, tiles[1], ld);
        if (rows <= ROW_TILE) return;
        _tile_stored(2, tiles[2], ld);
        _tile_stored(3, tiles[3], ld);
    }
};

// Groups of a matrix, two at a time; an odd one's last is met twice.
struct Pairs {
    const uint8_t* data;
    int64_t stride;
    int groups;
    const uint8_t* next;  // what will be read after the last, or null

    int count() const { return (groups + 1) / 2; }
    bool two(int pair) const { return 2 * pair + 1 < groups; }
    Groups operator[](int pair) const {
        const uint8_t *w = data + 2 * pair * stride, *behind = w + 2 * stride;
        return {w, two(pair) ? stride : 0, pair + 1 < count() || !next ? behind : next};
    }
};

// Pairs times rows. `finish(pair).part(sums, row, rows, i)`, for all i below `parts(rows)`, does something
// with what comes out for `rows` rows from `row` on; it is called while the unit is at what comes next.

// Up to two tiles of rows: one stream of chunks, each spread out while the unit is at the one before it,
// also from pair to pair.
template <Kind KIND, typename Finish>
void few_rows(const Pairs& pairs, const Activations& x, int rows, uint8_t* scratch, Finish finish) {
    constexpr int STEP = 2 * TILE_BYTES;
    static_assert(CHUNK * STEP <= group_scratch(0), "room for the next chunk");
    const int blocks = x.columns / BLOCK, count = pairs.count();
    Sums sums[2];
    auto finish_pair = [&](int pair) {
        const auto what = finish(pair);
        for (int i = 0; i < what.parts(rows); i++) what.part(sums[pair % 2], 0, rows, i);
    };
    uint8_t *weights = scratch, *next = scratch + CHUNK * STEP;
    spread_chunk<KIND>(pairs[0], 0, least(CHUNK, blocks), weights);
    for (int pair = 0; pair < count; pair++) {
        zero_sums();
        for (int begin = 0; begin < blocks; begin += CHUNK) {
            const int end = least(begin + CHUNK, blocks);
            if (end < blocks) spread_chunk<KIND>(pairs[pair], end, least(end + CHUNK, blocks), next);
            else if (pair + 1 < count) spread_chunk<KIND>(pairs[pair + 1], 0, least(CHUNK, blocks), next);
            for (int b = begin; b < end; b++) {
                const uint8_t* tiles = weights + (b - begin) * STEP;
                if (rows <= ROW_TILE) multiply<1>(tiles, x, 0, b);
                else multiply<2>(tiles, x, 0, b);
            }
            uint8_t* const done = weights;
            weights = next, next = done;
            if (begin == 0 && pair) finish_pair(pair - 1);
        }
        sums[pair % 2].take(rows, rows == 1);
    }
    finish_pair(count - 1);
}

// More: a pair is spread out once, and met by two tiles of rows after the other.
template <Kind KIND, typename Finish>
void many_rows(const Pairs& pairs, const Activations& x, int rows, uint8_t* scratch, Finish finish) {
    constexpr int STEP = 2 * TILE_BYTES;
    const int blocks = x.columns / BLOCK;
    Sums sums[2];
    for (int pair = 0; pair < pairs.count(); pair++) {
        const auto what = finish(pair);
        for (int b = 0; b < blocks; b += CHUNK)
            spread_chunk<KIND>(pairs[pair], b, least(b + CHUNK, blocks), scratch + b * STEP);
        int before = 0, turn = 0;
        for (int row = 0; row < rows; row += 2 * ROW_TILE, turn ^= 1) {
            const int count = least(rows - row, 2 * ROW_TILE), parts = before ? what.parts(before) : 0;
            zero_sums();
            for (int b = 0, i = 0; b < blocks; b++) {
                if (count > ROW_TILE) multiply<2>(scratch + b * STEP, x, row, b);
                else multiply<1>(scratch + b * STEP, x, row, b);
                for (; i < parts && i * blocks < parts * (b + 1); i++)
                    what.part(sums[turn ^ 1], row - 2 * ROW_TILE, before, i);
            }
            sums[turn].take(count, false);
            before = count;
        }
        const int last = (rows - 1) / (2 * ROW_TILE) * 2 * ROW_TILE;
        for (int i = 0; i < what.parts(before); i++) what.part(sums[turn ^ 1], last, before, i);
    }
}

template <Kind KIND, typename Finish>
void all_rows(const Pairs& pairs, const Activations& x, int rows, uint8_t* scratch, Finish finish) {
    if (!pairs.groups) return;
    if (rows <= 2 * ROW_TILE) few_rows<KIND>(pairs, x, rows, scratch, finish);
    else many_rows<KIND>(pairs, x, rows, scratch, finish);
}

// A tile's sums [lane][row] -> out[row * ld + lane], stored or added.
inline void put(const float* sums, int rows, float* out, int64_t ld, bool add, bool one) {
    if (one) {
        const Floats y = load(sums);
        store(out, add ? load(out) + y : y);
        return;
    }
    __m512 v[16];
    load_columns(sums, v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        if (r == rows) return;
        float* to = out + r * ld;
        store(to, add ? load(to) + Floats{v[r]} : Floats{v[r]});
    }
}

// Sums go to rows of floats.
struct ToRows {
    float* out;
    int64_t ld;
    bool add, two, one;  // two: whether the second group is one; one: there is but one row in all

    int parts(int rows) const { return rows > ROW_TILE ? 4 : 2; }
    void part(const Sums& sums, int row, int rows, int i) const {
        if (i % 2 && !two) return;
        const int tile = i / 2 * ROW_TILE;
        put(sums.tiles[i], least(rows - tile, ROW_TILE), out + (row + tile) * ld + i % 2 * LANES, ld, add, one);
    }
};

template <Kind KIND>
void linear_of(const Matrix& matrix, int begin, int end, const Activations& x, int rows, float* out,
               int64_t ld, bool add, uint8_t* scratch) {
    const Pairs pairs{matrix.data + begin * matrix.stride, matrix.stride, end - begin, matrix.next};
    out += (int64_t)begin * LANES;
    all_rows<KIND>(pairs, x, rows, scratch, [&](int pair) {
        return ToRows{out + (int64_t)pair * 2 * LANES, ld, add, pairs.two(pair), rows == 1};
    });
}

// 32 values of one row -> a block of its tile.
inline void put_row_block(Floats low, Floats high, const Activations& to, int row, int block) {
    int32_t* at = (int32_t*)tile_of(to, row, block) + row % ROW_TILE;
    if (to.lone) return _mm512_store_si512(at, rounded(low, high));
    const __m512i places = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    _mm512_i32scatter_epi32(at, places, rounded(low, high), 4);
}

// Gate and up of 16 hidden units become half a block of the activations that follow.
struct ToHidden {
    const Activations& to;
    int block, half;
    bool one;  // row in all

    int parts(int rows) const { return one ? 1 : rows > ROW_TILE ? 16 : 8; }
    void part(const Sums& sums, int row, int, int i) const {
        const int pitch = pitch_of(to);
        uint8_t* tile = tile_of(to, row + i / 8 * ROW_TILE, block) + half * 8 * pitch;
        if (one) {
            const Floats hidden = silu(load(sums.tiles[0])) * load(sums.tiles[1]);
            alignas(32) int32_t pairs[8];
            _mm256_store_si256((__m256i*)pairs, (__m256i)_mm512_cvtneps_pbh(hidden.v));
            for (int pair = 0; pair < 8; pair++) memcpy(tile + pitch * pair, pairs + pair, 4);
            return;
        }
        const float *gate = sums.tiles[i / 8 * 2] + i % 8 * 2 * ROW_TILE;
        const float *up = sums.tiles[i / 8 * 2 + 1] + i % 8 * 2 * ROW_TILE;
        const Floats even = silu(load(gate)) * load(up);
        const Floats odd = silu(load(gate + ROW_TILE)) * load(up + ROW_TILE);
        _mm512_store_si512(tile + 64 * (i % 8), rounded_pairs(even, odd));
    }
};

// Groups of gate and up lie in turn: see Model::lay_out.
template <Kind KIND>
void gate_up_of(const Matrix& gate, int begin, int end, const Activations& x, int rows,
                const Activations& to, uint8_t* scratch) {
    const Pairs pairs{gate.data + 2 * begin * gate.stride, gate.stride / 2, 4 * (end - begin), gate.next};
    all_rows<KIND>(pairs, x, rows, scratch, [&](int pair) {
        return ToHidden{to, begin + pair / 2, pair % 2, rows == 1};
    });
}

void linear_on_tiles(const Matrix& matrix, int begin, int end, const Activations& x, int rows,
                     float* out, int64_t ld, bool add, void* scratch) {
    const Tiles tiles(shapes_for(rows));
    const auto multiply = matrix.kind == Q4 ? linear_of<Q4> : linear_of<Q8>;
    multiply(matrix, begin, end, x, rows, out, ld, add, (uint8_t*)scratch);
}

void gate_up_on_tiles(const Matrix& gate, const Matrix& up, int begin, int end,
                      const Activations& x, int rows, const Activations& to, void* scratch) {
    if (gate.kind != up.kind)
        return gate_up_with(linear_on_tiles, put_row_block, gate, up, begin, end, x, rows, to, scratch);
    const Tiles tiles(shapes_for(rows));
    const auto multiply = gate.kind == Q4 ? gate_up_of<Q4> : gate_up_of<Q8>;
    multiply(gate, begin, end, x, rows, to, (uint8_t*)scratch);
}

void round_row(const float* x, const Activations& to, int row) {
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK)
        put_row_block(load(x), load(x + 16), to, row, b);
}

void norm_and_round_row(const float* x, const float* weight, float eps, const Activations& to, int row) {
    const Floats factor = splat(norm_factor(x, eps, to.columns));
    for (int b = 0; b < to.columns / BLOCK; b++, x += BLOCK, weight += BLOCK)
        put_row_block(load(x) * factor * load(weight), load(x + 16) * factor * load(weight + 16), to,
                      row, b);
}

// Linux grants the unit's state to a process that asks.
bool granted() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

namespace kvist {

const Kernels* kernels_amx() {
    static const Kernels* const found = []() -> const Kernels* {
        // Leaf 7, EDX: bit 22 AMX-BF16, 24 tiles. Such processors have AVX512-BF16 and VBMI2, too.
        uint32_t a, b, c, d;
        asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
        if (!(d >> 22 & 1) || !(d >> 24 & 1) || !granted()) return nullptr;
        static Kernels table = *kernels_avx512();
        table.name = "amx";
        table.tiles = true;
        table.quantise = round_row;
        table.norm_quantise = norm_and_round_row;
        table.linear = linear_on_tiles;
        table.gate_up = gate_up_on_tiles;
        table.attend = attend_on_tiles;
        table.together = 64;
        table.for_floats = kernels_avx512();
        return &table;
    }();
    return found;
}

}  // namespace kvist

#else  // another system, or a compiler that does not know the unit

const kvist::Kernels* kvist::kernels_amx() { return nullptr; }

#endif
