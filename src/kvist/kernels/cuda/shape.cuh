// The shape that this build is for, what follows from it, and what a block keeps in shared memory.
//
// KV heads, and the columns of the MLP, are dealt out to teams of blocks; within a team each
// matrix's rows are dealt out to its members. So what a team computes of attention and MLP it
// computes alone, and only the residual stream, twice a layer, is gathered from all teams.
#pragma once
#include "words.cuh"

namespace kvist {

constexpr int HIDDEN = KVIST_HIDDEN, HEADS = KVIST_HEADS, KV_HEADS = KVIST_KV_HEADS;
constexpr int HEAD_DIM = KVIST_HEAD_DIM, INTERMEDIATE = KVIST_INTERMEDIATE;
constexpr bool QK_NORM = KVIST_QK_NORM;
constexpr int TEAMS = KVIST_KV_HEADS, MEMBERS = KVIST_MEMBERS, BLOCKS = TEAMS * MEMBERS;

constexpr int WARPS = KVIST_WARPS;           // that compute; one more streams the weights
constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 32;
constexpr int MOST_SHARED = 227 * 1024;      // of a block, on compute capability 9.0

constexpr int Q_HEADS = HEADS / TEAMS;       // of a team, for its one KV head
constexpr int TEAM_Q = Q_HEADS * HEAD_DIM, TEAM_QKV = TEAM_Q + 2 * HEAD_DIM;
constexpr int Q_ROWS = TEAM_Q / MEMBERS, KV_ROWS = HEAD_DIM / MEMBERS;
constexpr int SLICE = HIDDEN / MEMBERS;      // channels of the residual stream that a member adds to
constexpr int ACTS = INTERMEDIATE / TEAMS, ACT_ROWS = ACTS / MEMBERS;

static_assert(HEAD_DIM == 128, "lanes hold 8 channels of a head, 16 lanes a head");
static_assert(HEADS % TEAMS == 0 && Q_HEADS <= 4 && TEAMS % 4 == 0 && MEMBERS % 8 == 0);
static_assert(HIDDEN % (32 * MEMBERS) == 0 && HIDDEN % (32 * WARPS) == 0);
static_assert(INTERMEDIATE % BLOCKS == 0 && ACTS % 16 == 0);

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A slot holds 16 rows of 1024 columns, or as many bytes of other rows, each 16 bytes longer.
constexpr int SLOT = 33792;

// How many columns of k stand in a slot: the most that divide it, in units that warps can share.
constexpr int slot_width(int k, int unit) {
  for (int width = least(k, SLOT / 32 - 8);; width--) {
    if (k % width == 0 && width % unit == 0) return width;
  }
}
// How many rows of such a width: in tiles of 16.
constexpr int slot_rows(int width) { return least(SLOT / (width * 2 + 16), 64) / 16 * 16; }
constexpr int X_WIDTH = slot_width(HIDDEN, 32 * WARPS), X_ROWS = slot_rows(X_WIDTH);

// A block's part of a matrix product; a slot's rows are streamed and multiplied at a time.
template <int ROWS_, int K, int WIDTH_, int BLOCK_ROWS_>
struct Product {
  static constexpr int ROWS = ROWS_, WIDTH = WIDTH_, PARTS = K / WIDTH, BLOCK_ROWS = BLOCK_ROWS_;
  // Rows lie a little apart, so that eight of them, 16 bytes of each, fall into all 32 banks.
  static constexpr int PITCH = WIDTH * 2 + 16;
  static constexpr int STEPS = WIDTH / 16;   // products of 16 columns, dealt out to the warps
  static constexpr int MOST_STEPS = (STEPS + WARPS - 1) / WARPS;
  static constexpr int TILES = BLOCK_ROWS / 16, PADDED = round_up(ROWS, BLOCK_ROWS);
  static_assert(BLOCK_ROWS >= 16 && BLOCK_ROWS * PITCH <= SLOT);
  __device__ static int begin(int warp) { return STEPS * warp / WARPS; }
  __device__ static int end(int warp) { return STEPS * (warp + 1) / WARPS; }
};

// Of the residual stream: q, k and v, gate and up, and the head X_ROWS at a time.
template <int ROWS>
using OfX = Product<ROWS, HIDDEN, X_WIDTH, X_ROWS>;
using Qkv = OfX<Q_ROWS + 2 * KV_ROWS>;
using GateUp = OfX<2 * ACT_ROWS>;
using Head = OfX<X_ROWS>;
// Of what a team has computed, back to it.
template <int K>
using ToX = Product<SLICE, K, slot_width(K, 16),
                    least(slot_rows(slot_width(K, 16)), round_up(SLICE, 16))>;
using Out = ToX<TEAM_Q>;
using Down = ToX<ACTS>;
static_assert(Qkv::ROWS <= WORKERS && SLICE <= WORKERS && ACT_ROWS <= WORKERS, "a thread a row");
static_assert(TEAM_QKV <= 4 * WORKERS && TEAM_Q / 2 <= WORKERS, "a thread some channels");
static_assert(Out::PARTS == 1, "a warp keeps its share of attention's output");

constexpr int MOST_ROWS = most(most(most(Qkv::PADDED, GateUp::PADDED), 2 * X_ROWS),
                               most(Out::PADDED, Down::PADDED));
// What warps have summed of a row stands together, rows a little apart for the banks' sake.
constexpr int SUMS_PITCH = WARPS + 4;
static_assert(WARPS % 4 == 0);

// In attention half a warp has a query head and a position: so many heads, and positions at once.
constexpr int GROUPS = Q_HEADS == 1 ? 1 : round_up(Q_HEADS, 2);
constexpr int AT_ONCE = 2 * WARPS / GROUPS;
constexpr int LONGEST = 8192;                // positions
constexpr int MOST_PLACES = LONGEST / MEMBERS;

struct Working {
  // The normalised residual stream but for its scale: 4 channels (2q, 2q + 1, 2q + 8, 2q + 9 of 16)
  // in bfloat16, then what rounding them lost, likewise.
  uint4 x[HIDDEN / 4];
  alignas(16) float squares[WARPS];          // of the residual stream, each warp's sum
  float qkv[TEAM_QKV];
  float rotation[HEAD_DIM];                  // the position's cosines, then sines
  int places[MOST_PLACES];                   // of this block's positions in the planes
  // Of products, rows of each warp's sums; two, for warps may still add up one while others fill the
  // next.
  alignas(16) float sums[2][MOST_ROWS * SUMS_PITCH];
  float head_out[AT_ONCE][TEAM_Q];           // of attention, by positions looked at together
  float2 head_stats[AT_ONCE][Q_HEADS];       // its scores' maximum, sum of weights
};

constexpr int SLOTS = (MOST_SHARED - static_cast<int>(sizeof(Working)) - 256) / (SLOT + 16);
static_assert(SLOTS >= 2, "too little shared memory to stream weights ahead");

struct Shared {
  alignas(128) unsigned char slots[SLOTS][SLOT];
  alignas(16) Working working;
  uint64_t full[SLOTS], empty[SLOTS];
};
static_assert(sizeof(Shared) + 128 <= MOST_SHARED);

// One layer, by address: weights as torch keeps them, the cache's planes as the pool does.
struct Layer {
  const bf16 *input_norm, *qkv, *q_norm, *k_norm, *out, *mlp_norm, *gate_up, *down;
  bf16 *keys, *values;  // [blocks, block_size, KV_HEADS, HEAD_DIM]
};

constexpr int MOST_LAYERS = 64;

// What blocks exchange in a layer, in words. Channels stand in the order in which lanes take them:
// of each 16, channels 2q, 2q + 1, 2q + 8 and 2q + 9 are neighbours.
__device__ __forceinline__ int lane_order(int channel) {
  return (channel & ~15) | (channel & 6) << 1 | (channel & 8) >> 2 | (channel & 1);
}
constexpr int OWN = HIDDEN / BLOCKS;  // channels of which a block adds up what all teams computed
constexpr int PART = 12;              // 16 channels in pairs, maximum, sum of weights, 2 unused
constexpr int SUMS_AT = 0;                                  // [2][TEAMS][HIDDEN]
constexpr int TOTALS_AT = SUMS_AT + 2 * TEAMS * HIDDEN;     // [2][HIDDEN]
constexpr int QKV_AT = TOTALS_AT + 2 * HIDDEN;              // [TEAMS][TEAM_QKV]
constexpr int PARTS_AT = QKV_AT + TEAMS * TEAM_QKV;         // [TEAMS][TEAM_Q / 16][MEMBERS][PART]
constexpr int ACTS_AT = PARTS_AT + TEAMS * TEAM_Q / 16 * MEMBERS * PART;  // [TEAMS][ACTS]
constexpr int LAYER_WORDS = ACTS_AT + TEAMS * ACTS;
static_assert(LAYER_WORDS % 4 == 0 && OWN % 4 == 0);

// One layer's words of this step, and of the step after it, which nobody reads before it.
struct Exchange {
  uint32_t *now, *next;

  __device__ void put(int word, uint32_t bits) const {
    publish(now + word, bits == ABSENT ? 0x7fffffffu : bits);
    publish(next + word, ABSENT);
  }
  __device__ void put(int word, float value) const { put(word, __float_as_uint(value)); }
};

// Where a thread stands.
struct Place {
  int warp, lane, team, member;
};

}  // namespace kvist
