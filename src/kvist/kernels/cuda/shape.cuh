// The shape that this build is for, what follows from it, and what a block keeps in shared memory.
//
// KV heads, and the columns of the MLP, are dealt out to clusters; within a cluster each matrix's
// rows are dealt out to blocks. So what a cluster computes of attention and MLP it computes alone,
// and only the residual stream, twice a layer, is gathered from all of them.
#pragma once
#include "ptx.cuh"

namespace kvist {

constexpr int HIDDEN = KVIST_HIDDEN, HEADS = KVIST_HEADS, KV_HEADS = KVIST_KV_HEADS;
constexpr int HEAD_DIM = KVIST_HEAD_DIM, INTERMEDIATE = KVIST_INTERMEDIATE;
constexpr bool QK_NORM = KVIST_QK_NORM;
constexpr int CLUSTERS = KVIST_CLUSTERS, CLUSTER = KVIST_CLUSTER;  // how many, and blocks of each
constexpr int BLOCKS = CLUSTERS * CLUSTER;

constexpr int WARPS = KVIST_WARPS;           // that compute; one more streams the weights
constexpr int WORKERS = WARPS * 32, THREADS = WORKERS + 32;
constexpr int MOST_SHARED = 227 * 1024;      // of a block, from compute capability 9.0 on

constexpr int Q_HEADS = HEADS / CLUSTERS;    // of a cluster, all of one KV head
constexpr int Q_ROWS = Q_HEADS * HEAD_DIM / CLUSTER, KV_ROWS = HEAD_DIM / CLUSTER;
constexpr int SLICE = HIDDEN / CLUSTER;      // of the residual stream, a block's own
constexpr int ACTS = INTERMEDIATE / CLUSTERS, ACT_ROWS = ACTS / CLUSTER;
constexpr int GATHERERS = SLICE / 32;        // warps that gather it
constexpr int FIRST_GATHERER = WARPS - GATHERERS;
constexpr int SENDERS = 4;                   // warps that share the sending of a product's sums

static_assert(HEAD_DIM == 128, "lanes hold 8 channels of a head, 16 lanes a head");
static_assert(HEADS % CLUSTERS == 0 && CLUSTERS % KV_HEADS == 0 && Q_HEADS <= 4);
static_assert(CLUSTERS % 4 == 0 && CLUSTER % 8 == 0 && CLUSTER <= 16);
static_assert(HIDDEN % (32 * CLUSTER) == 0 && GATHERERS <= WARPS && SENDERS <= WARPS);
static_assert(INTERMEDIATE % (CLUSTERS * CLUSTER) == 0 && ACTS % 16 == 0);

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// How many columns of k stand in a slot: the most that divide it.
constexpr int slot_width(int k) {
  for (int width = least(k, 1280);; width--) {
    if (k % width == 0 && width % 16 == 0) return width;
  }
}
// Rows lie a little apart, so that eight of them, 16 bytes of each, fall into all 32 banks.
constexpr int slot_pitch(int k) { return slot_width(k) * 2 + 16; }

constexpr int SLOT = most(16 * slot_pitch(HIDDEN), 33792);

// A block's part of a matrix product, in tiles of 16 rows: as many as fit are streamed at a time.
template <int ROWS_, int K_>
struct Product {
  static constexpr int ROWS = ROWS_, K = K_;
  static constexpr int WIDTH = slot_width(K), PITCH = slot_pitch(K), PARTS = K / WIDTH;
  static constexpr int STEPS = WIDTH / 16;   // products of 16 columns, dealt out to the warps
  static constexpr int MOST_STEPS = (STEPS + WARPS - 1) / WARPS;
  static constexpr int BLOCK_ROWS = least(least(SLOT / PITCH, 64) / 16 * 16, round_up(ROWS, 16));
  static constexpr int TILES = BLOCK_ROWS / 16, ROW_BLOCKS = (ROWS + BLOCK_ROWS - 1) / BLOCK_ROWS;
  static constexpr int PADDED = round_up(ROWS, 16);
  static_assert(BLOCK_ROWS >= 16 && BLOCK_ROWS * PITCH <= SLOT);
};

using Qkv = Product<Q_ROWS + 2 * KV_ROWS, HIDDEN>;
using Out = Product<SLICE, Q_HEADS * HEAD_DIM>;
using GateUp = Product<2 * ACT_ROWS, HIDDEN>;
using Down = Product<SLICE, ACTS>;
using Head = Product<16, HIDDEN>;

constexpr int MOST_ROWS = most(most(Qkv::PADDED, Out::PADDED), most(GateUp::PADDED, 32));

// A little apart, so that eight blocks' parts fall into all 32 banks.
constexpr int PART_PITCH = Q_HEADS * HEAD_DIM / 2 + 4;

// What other blocks of the cluster send here, and what warps give to one another.
struct Working {
  // The normalised residual stream but for its scale: 4 channels (2q, 2q + 1, 2q + 8, 2q + 9 of 16)
  // in bfloat16, then what rounding them lost, likewise.
  uint4 x[HIDDEN / 4];
  float squares[CLUSTER * GATHERERS];        // of the residual stream, summed by slices
  float qkv[(Q_HEADS + 2) * HEAD_DIM];
  uint32_t parts[CLUSTER][PART_PITCH];       // each block's attention output, in pairs of bfloat16
  float2 part_stats[CLUSTER][Q_HEADS];       // its scores' maximum, sum of weights
  float acts[ACTS];
  float rotation[HEAD_DIM];                  // the position's cosines, then sines
  // Of products, each warp's sums; two, for warps may still add up one while others fill the next.
  float sums[2][WARPS][MOST_ROWS];
  float head_out[WARPS][Q_HEADS * HEAD_DIM]; // of attention, each warp's
  float2 head_stats[WARPS][Q_HEADS];
  uint64_t got_x, got_qkv, got_parts, got_acts;
};

constexpr uint32_t X_BYTES = HIDDEN * 4 + CLUSTER * GATHERERS * 4;
constexpr uint32_t QKV_BYTES = (Q_HEADS + 2) * HEAD_DIM * 4;
constexpr uint32_t PART_BYTES = CLUSTER * Q_HEADS * (HEAD_DIM * 2 + 8);
constexpr uint32_t ACT_BYTES = ACTS * 4;

constexpr int SLOTS = (MOST_SHARED - static_cast<int>(sizeof(Working)) - 256) / (SLOT + 16);
static_assert(SLOTS >= 2, "too little shared memory to stream weights ahead");

struct Shared {
  alignas(128) unsigned char slots[SLOTS][SLOT];
  alignas(16) Working working;
  uint64_t full[SLOTS], empty[SLOTS];
};
static_assert(sizeof(Shared) <= MOST_SHARED);

// One layer, by address: weights as torch keeps them, the cache's planes as the pool does.
struct Layer {
  const bf16 *input_norm, *qkv, *q_norm, *k_norm, *out, *mlp_norm, *gate_up, *down;
  bf16 *keys, *values;  // [blocks, block_size, KV_HEADS, HEAD_DIM]
};

}  // namespace kvist
