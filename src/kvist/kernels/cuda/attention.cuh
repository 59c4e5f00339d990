// Attention of one token in one cluster: positions are dealt out to its blocks in turn, half a warp
// a position, and each block sends its part of the output to all.
#pragma once
#include "shape.cuh"

namespace kvist {

// Where a thread stands, and what the step is about.
struct Place {
  int warp, lane;
  uint32_t cluster, rank;
};

constexpr int GROUPS = Q_HEADS == 4 ? 2 : 1;   // of query heads; a half warp has one of them
constexpr int EACH = Q_HEADS / GROUPS;
constexpr int AT_ONCE = 2 * WARPS / GROUPS;           // positions of a block that are looked at together
constexpr int DEPTH = 2;                       // of which so many rounds are read ahead
constexpr float NOTHING = -1e30f;              // a maximum of no scores

struct Eight {  // channels 4i .. 4i + 3 and 64 + 4i .. of a head: rotary pairs them
  float v[8];
  __device__ static Eight of(uint2 a, uint2 b) {
    const float2 p = unpack(a.x), q = unpack(a.y), r = unpack(b.x), s = unpack(b.y);
    return {{p.x, p.y, q.x, q.y, r.x, r.y, s.x, s.y}};
  }
  __device__ static Eight read(const float *head, int i) {
    const float4 a = *reinterpret_cast<const float4 *>(head + 4 * i);
    const float4 b = *reinterpret_cast<const float4 *>(head + 64 + 4 * i);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
};

// Everything of a step's attention that is the same in all layers.
struct Attention {
  const int32_t *table;
  int block_size, cached, count, half, first, group, lane16, kv_head;
  int new_round;      // in which this half warp has the new token, or -1
  int64_t new_place;
  float eps;

  __device__ Attention(const int32_t *table, int block_size, int length, int64_t new_place,
                       float eps, const Place &at)
      : table(table), block_size(block_size), cached(length - 1),
        new_round(-1), new_place(new_place), eps(eps) {
    const int rank = static_cast<int>(at.rank);
    count = length > rank ? (length - rank + CLUSTER - 1) / CLUSTER : 0;
    half = at.warp * 2 + at.lane / 16, lane16 = at.lane % 16;
    group = half % GROUPS, first = half / GROUPS;
    kv_head = at.cluster / (CLUSTERS / KV_HEADS);
    if (length > 0 && cached % CLUSTER == rank && cached / CLUSTER % AT_ONCE == first) {
      new_round = cached / CLUSTER / AT_ONCE;
    }
  }

  __device__ int position(int round, uint32_t rank) const {
    return (round * AT_ONCE + first) * CLUSTER + static_cast<int>(rank);
  }
  // Of a position's keys in the planes, this thread's first channel.
  __device__ int64_t offset(int t) const {
    const int64_t place = static_cast<int64_t>(table[t / block_size]) * block_size + t % block_size;
    return (place * KV_HEADS + kv_head) * HEAD_DIM + 4 * lane16;
  }
  __device__ int rounds() const { return (count + AT_ONCE - 1) / AT_ONCE; }

  // Have the second level cache hold a layer's keys and values.
  __device__ void prefetch(const Layer &layer, uint32_t rank) const {
    if (lane16 % 4 || group) return;  // four lanes: two lines of keys, two of values
    for (int round = 0; round < rounds(); round++) {
      const int t = position(round, rank);
      if (t >= cached) break;
      const bf16 *plane = lane16 & 8 ? layer.values : layer.keys;
      const bf16 *line = plane + (offset(t) - 4 * lane16) + (lane16 & 4) * 16;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
  }

  // Normalised with packed weights, and rotated.
  __device__ Eight rotated(Eight x, const uint2 (&weights)[2], const Working &working) const {
    if (QK_NORM) {
      const Eight weight = Eight::of(weights[0], weights[1]);
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) squares = fmaf(x.v[i], x.v[i], squares);
      const float scale = rsqrtf(sum_of(squares, 16) / HEAD_DIM + eps);
#pragma unroll
      for (int i = 0; i < 8; i++) x.v[i] *= scale * weight.v[i];
    }
    const Eight turn = Eight::read(working.rotation, lane16);
    Eight y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      y.v[i] = x.v[i] * turn.v[i] - x.v[4 + i] * turn.v[4 + i];
      y.v[4 + i] = x.v[4 + i] * turn.v[i] + x.v[i] * turn.v[4 + i];
    }
    return y;
  }
};

// Attend, and send the block's part to the whole cluster. All `WORKERS` threads call it.
__device__ __forceinline__ void attend(const Attention &a, const Layer &layer, Working &working,
                                       const Place &at, uint32_t parity, uint32_t limit) {
  const int rounds = a.rounds(), i16 = a.lane16;
  uint2 keys[DEPTH][2], values[DEPTH][2];
  auto read = [&](int begin) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      const int t = a.position(begin + i, at.rank);
      if (t >= a.cached) continue;
      const int64_t offset = a.offset(t);
      const uint2 *k = reinterpret_cast<const uint2 *>(layer.keys + offset);
      const uint2 *v = reinterpret_cast<const uint2 *>(layer.values + offset);
      keys[i][0] = __ldcg(k), keys[i][1] = __ldcg(k + 16);
      values[i][0] = __ldcg(v), values[i][1] = __ldcg(v + 16);
    }
  };
  read(0);
  uint2 q_norm[2] = {}, k_norm[2] = {};
  if (QK_NORM) {
    for (int i = 0; i < 2; i++) {
      q_norm[i] = *reinterpret_cast<const uint2 *>(layer.q_norm + 64 * i + 4 * i16);
      k_norm[i] = *reinterpret_cast<const uint2 *>(layer.k_norm + 64 * i + 4 * i16);
    }
  }
  barrier_wait(shared_address(&working.got_qkv), parity, limit);
  if (at.warp == 0 && at.lane == 0) barrier_expect(shared_address(&working.got_qkv), QKV_BYTES);

  Eight q[EACH];
#pragma unroll
  for (int h = 0; h < EACH; h++) {
    const float *head = working.qkv + (a.group * EACH + h) * HEAD_DIM;
    q[h] = a.rotated(Eight::read(head, i16), q_norm, working);
#pragma unroll
    for (int i = 0; i < 8; i++) q[h].v[i] *= 0.08838834764831845f * 1.4426950408889634f;
  }
  // The new token is seen as the cache will hold it.
  uint2 new_key[2] = {}, new_value[2] = {};
  if (__any_sync(~0u, a.new_round >= 0)) {
    const float *head = working.qkv + Q_HEADS * HEAD_DIM;
    const Eight k = a.rotated(Eight::read(head, i16), k_norm, working);
    const Eight v = Eight::read(head + HEAD_DIM, i16);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      new_key[i] = make_uint2(pack(k.v[4 * i], k.v[4 * i + 1]), pack(k.v[4 * i + 2], k.v[4 * i + 3]));
      new_value[i] =
          make_uint2(pack(v.v[4 * i], v.v[4 * i + 1]), pack(v.v[4 * i + 2], v.v[4 * i + 3]));
    }
    if (a.new_round >= 0 && a.group == 0 && at.cluster % (CLUSTERS / KV_HEADS) == 0) {
      const int64_t offset = (a.new_place * KV_HEADS + a.kv_head) * HEAD_DIM + 4 * i16;
      uint2 *k_to = reinterpret_cast<uint2 *>(layer.keys + offset);
      uint2 *v_to = reinterpret_cast<uint2 *>(layer.values + offset);
      k_to[0] = new_key[0], k_to[16] = new_key[1];
      v_to[0] = new_value[0], v_to[16] = new_value[1];
    }
  }

  float highest[EACH], weight[EACH];
  Eight out[EACH] = {};
#pragma unroll
  for (int h = 0; h < EACH; h++) highest[h] = NOTHING, weight[h] = 0;
  for (int begin = 0; begin < rounds; begin += DEPTH) {
    if (begin) read(begin);
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (begin + i >= rounds) break;
      const bool is_new = a.new_round == begin + i;
      const bool there = is_new || a.position(begin + i, at.rank) < a.cached;
      const Eight k = is_new ? Eight::of(new_key[0], new_key[1]) : Eight::of(keys[i][0], keys[i][1]);
      const Eight v =
          is_new ? Eight::of(new_value[0], new_value[1]) : Eight::of(values[i][0], values[i][1]);
#pragma unroll
      for (int h = 0; h < EACH; h++) {
        float score = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) score = fmaf(q[h].v[j], k.v[j], score);
        score = sum_of(score, 16);
        if (there) {  // what was not read may be anything
          const float higher = fmaxf(highest[h], score);
          const float old = exp2f(highest[h] - higher), now = exp2f(score - higher);
          highest[h] = higher, weight[h] = fmaf(weight[h], old, now);
#pragma unroll
          for (int j = 0; j < 8; j++) out[h].v[j] = fmaf(now, v.v[j], out[h].v[j] * old);
        }
      }
    }
  }

  // One output a warp.
#pragma unroll
  for (int h = 0; h < EACH; h++) {
    if (GROUPS == 1) {
      const float both = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 16));
      const float scale = exp2f(highest[h] - both);
      highest[h] = both, weight[h] *= scale;
      weight[h] += __shfl_xor_sync(~0u, weight[h], 16);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float mine = out[h].v[j] * scale;
        out[h].v[j] = mine + __shfl_xor_sync(~0u, mine, 16);
      }
    }
  }
  constexpr int in_a_warp = AT_ONCE / WARPS;
  const int active = least(WARPS, (a.count + in_a_warp - 1) / in_a_warp);
  if (at.warp < active) {
#pragma unroll
    for (int h = 0; h < EACH; h++) {
      const int head = a.group * EACH + h;
      if (GROUPS == 1 && h % 2 != at.lane / 16) continue;  // half of the writing each
      float *to = working.head_out[at.warp] + head * HEAD_DIM + 4 * i16;
      const float *v = out[h].v;
      *reinterpret_cast<float4 *>(to) = make_float4(v[0], v[1], v[2], v[3]);
      *reinterpret_cast<float4 *>(to + 64) = make_float4(v[4], v[5], v[6], v[7]);
      if (i16 == 0) working.head_stats[at.warp][head] = make_float2(highest[h], weight[h]);
    }
  }
  sync_threads(WORKERS);

  // One output a block, in pairs of channels; threads share the blocks that it goes to.
  constexpr int PAIRS = Q_HEADS * HEAD_DIM / 2, SHARES = least(WORKERS / PAIRS, CLUSTER);
  const int thread = at.warp * 32 + at.lane, pair = thread % PAIRS, share = thread / PAIRS;
  if (share >= SHARES) return;
  const int head = pair / (HEAD_DIM / 2);
  float top = NOTHING, sum = 0, x = 0, y = 0;
  for (int warp = 0; warp < active; warp++) top = fmaxf(top, working.head_stats[warp][head].x);
  for (int warp = 0; warp < active; warp++) {
    const float2 stats = working.head_stats[warp][head];
    const float2 o = *reinterpret_cast<const float2 *>(working.head_out[warp] + 2 * pair);
    const float scale = exp2f(stats.x - top);
    sum = fmaf(stats.y, scale, sum), x = fmaf(o.x, scale, x), y = fmaf(o.y, scale, y);
  }
  const uint32_t got = shared_address(&working.got_parts);
  const uint32_t to = shared_address(&working.parts[at.rank][pair]);
  const uint32_t stats = shared_address(&working.part_stats[at.rank][head]);
  const uint32_t word = pack(x, y);
#pragma unroll 4
  for (int rank = share; rank < CLUSTER; rank += SHARES) {
    const uint32_t barrier = at_rank(got, rank);
    send(at_rank(to, rank), word, barrier);
    if (pair % (HEAD_DIM / 2) == 0) {
      send(at_rank(stats, rank), make_uint2(__float_as_uint(top), __float_as_uint(sum)), barrier);
    }
  }
}

// 16 channels of the cluster's attention output, from all blocks' parts, as `multiply` takes them.
__device__ __forceinline__ uint2 attended(const Working &working, int step, int lane) {
  const int column = lane / 4, q = lane % 4, head = step / (HEAD_DIM / 16);
  float2 stats[CLUSTER / 8];
  float top = NOTHING;
#pragma unroll
  for (int i = 0; i < CLUSTER / 8; i++) {
    stats[i] = working.part_stats[column + 8 * i][head];
    top = fmaxf(top, stats[i].x);
  }
  for (int offset = 4; offset < 32; offset *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  float sum = 0, v[4] = {};
#pragma unroll
  for (int i = 0; i < CLUSTER / 8; i++) {
    const uint32_t *part = working.parts[column + 8 * i] + step * 8 + q;
    const float2 a = unpack(part[0]), b = unpack(part[4]);
    const float scale = exp2f(stats[i].x - top);
    sum = fmaf(stats[i].y, scale, sum);
    v[0] = fmaf(a.x, scale, v[0]), v[1] = fmaf(a.y, scale, v[1]);
    v[2] = fmaf(b.x, scale, v[2]), v[3] = fmaf(b.y, scale, v[3]);
  }
  for (int offset = 4; offset < 32; offset *= 2) {
    sum += __shfl_xor_sync(~0u, sum, offset);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += __shfl_xor_sync(~0u, v[i], offset);
  }
  const float scale = sum > 0 ? 1.f / sum : 0.f;  // no keys at all: a row that only pads
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] *= scale;
  return column % 2 ? make_uint2(pack_rest(v[0], v[1]), pack_rest(v[2], v[3]))
                    : make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
}

}  // namespace kvist
