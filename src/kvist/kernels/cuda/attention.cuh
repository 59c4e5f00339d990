// Attention of one token in one team: positions are dealt out to its members in turn, half a warp a
// position, and each member publishes its part of the output.
#pragma once
#include "shape.cuh"

namespace kvist {

constexpr int DEPTH = 2;           // rounds of positions that are read ahead
constexpr float NOTHING = -1e30f;  // a maximum of no scores

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
  int cached, count;   // keys in the cache; positions of this block, the new one's included
  int first, group;    // of the positions and heads, this half warp's
  int lane16, team;
  int active;          // of AT_ONCE, how many ever have a position
  int new_round;       // in which this half warp has the new token, or -1
  int new_place;
  float eps;

  __device__ Attention(int length, int new_place, float eps, const Place &at)
      : cached(length - 1), new_round(-1), new_place(new_place), eps(eps) {
    count = length > at.member ? (length - at.member + MEMBERS - 1) / MEMBERS : 0;
    active = least(AT_ONCE, count);
    const int half = at.warp * 2 + at.lane / 16;
    lane16 = at.lane % 16, group = half % GROUPS, first = half / GROUPS, team = at.team;
    if (length > 0 && cached % MEMBERS == at.member && cached / MEMBERS % AT_ONCE == first) {
      new_round = cached / MEMBERS / AT_ONCE;
    }
  }

  // Look up where the block's positions lie in the planes.
  __device__ void place(const int32_t *table, int block_size, Working &working,
                        const Place &at) const {
#pragma unroll 1
    for (int i = at.warp * 32 + at.lane; i < least(count, MOST_PLACES); i += WORKERS) {
      const int t = i * MEMBERS + at.member;
      working.places[i] = table[t / block_size] * block_size + t % block_size;
    }
  }
  __device__ int index(int round) const { return round * AT_ONCE + first; }
  __device__ bool has(int round) const {  // a position that is in the cache
    return index(round) < count - (new_round >= 0 && round == new_round);
  }
  __device__ size_t offset(int place) const {
    return (static_cast<size_t>(place) * KV_HEADS + team) * HEAD_DIM;
  }
  __device__ int rounds() const { return (count + AT_ONCE - 1) / AT_ONCE; }

  // Have the second level cache hold a layer's keys and values: four lines a position.
  __device__ void prefetch(const Layer &layer, const Working &working, int thread,
                           int threads) const {
    const bf16 *plane = thread & 2 ? layer.values : layer.keys;
#pragma unroll 1
    for (int i = thread / 4; i < count; i += threads / 4) {
      prefetch_line(plane + offset(working.places[i]) + (thread & 1) * 64);
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

// A busy warp's part: queries, the new token, then its positions; one output for the warp.
template <class Read>
__device__ __forceinline__ void attend_to_mine(const Attention &a, const Layer &layer,
                                               Working &working, const Place &at,
                                               uint2 (&keys)[DEPTH][2], uint2 (&values)[DEPTH][2],
                                               const uint2 (&q_norm)[2], const uint2 (&k_norm)[2],
                                               Read read) {
  const int rounds = a.rounds(), i16 = a.lane16, head = least(a.group, Q_HEADS - 1);
  Eight q = a.rotated(Eight::read(working.qkv + head * HEAD_DIM, i16), q_norm, working);
#pragma unroll
  for (int i = 0; i < 8; i++) q.v[i] *= 0.08838834764831845f * 1.4426950408889634f;
  // The new token is seen as the cache will hold it.
  uint2 new_key[2] = {}, new_value[2] = {};
  if (__any_sync(~0u, a.new_round >= 0)) {
    const float *raw = working.qkv + TEAM_Q;
    const Eight k = a.rotated(Eight::read(raw, i16), k_norm, working);
    const Eight v = Eight::read(raw + HEAD_DIM, i16);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      new_key[i] = make_uint2(pack(k.v[4 * i], k.v[4 * i + 1]), pack(k.v[4 * i + 2], k.v[4 * i + 3]));
      new_value[i] =
          make_uint2(pack(v.v[4 * i], v.v[4 * i + 1]), pack(v.v[4 * i + 2], v.v[4 * i + 3]));
    }
    if (a.new_round >= 0 && a.group == 0) {
      const size_t offset = a.offset(a.new_place) + 4 * i16;
      uint2 *k_to = reinterpret_cast<uint2 *>(layer.keys + offset);
      uint2 *v_to = reinterpret_cast<uint2 *>(layer.values + offset);
      k_to[0] = new_key[0], k_to[16] = new_key[1];
      v_to[0] = new_value[0], v_to[16] = new_value[1];
    }
  }

  float highest = NOTHING, weight = 0;
  Eight out = {};
  for (int begin = 0; begin < rounds; begin += DEPTH) {
    if (begin) read(begin);
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (begin + i >= rounds) break;
      const bool is_new = a.new_round == begin + i;
      const Eight k = is_new ? Eight::of(new_key[0], new_key[1]) : Eight::of(keys[i][0], keys[i][1]);
      float score = 0;
#pragma unroll
      for (int j = 0; j < 8; j++) score = fmaf(q.v[j], k.v[j], score);
      score = sum_of(score, 16);
      if (is_new || a.has(begin + i)) {  // what was not read may be anything
        const Eight v =
            is_new ? Eight::of(new_value[0], new_value[1]) : Eight::of(values[i][0], values[i][1]);
        const float higher = fmaxf(highest, score);
        const float old = power_of_two(highest - higher), now = power_of_two(score - higher);
        highest = higher, weight = fmaf(weight, old, now);
#pragma unroll
        for (int j = 0; j < 8; j++) out.v[j] = fmaf(now, v.v[j], out.v[j] * old);
      }
    }
  }
  if (a.group >= Q_HEADS) return;
  float *to = working.head_out[a.first] + head * HEAD_DIM + 4 * i16;
  *reinterpret_cast<float4 *>(to) = make_float4(out.v[0], out.v[1], out.v[2], out.v[3]);
  *reinterpret_cast<float4 *>(to + 64) = make_float4(out.v[4], out.v[5], out.v[6], out.v[7]);
  if (i16 == 0) working.head_stats[a.first][head] = make_float2(highest, weight);
}

// Attend, and publish the block's part. All `WORKERS` threads call it.
__device__ __forceinline__ void attend(const Attention &a, const Layer &layer,
                                       const Exchange &exchange, Working &working,
                                       const Place &at, uint32_t limit) {
  const int i16 = a.lane16;
  uint2 keys[DEPTH][2], values[DEPTH][2];
  auto read = [&](int begin) {
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (!a.has(begin + i)) continue;
      const size_t offset = a.offset(working.places[a.index(begin + i)]) + 4 * i16;
      const uint2 *k = reinterpret_cast<const uint2 *>(layer.keys + offset);
      const uint2 *v = reinterpret_cast<const uint2 *>(layer.values + offset);
      keys[i][0] = __ldcg(k), keys[i][1] = __ldcg(k + 16);
      values[i][0] = __ldcg(v), values[i][1] = __ldcg(v + 16);
    }
  };
  const bool busy = 2 * at.warp / GROUPS < a.active;
  uint2 q_norm[2] = {}, k_norm[2] = {};
  if (busy) read(0);
  if (QK_NORM && busy) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      q_norm[i] = *reinterpret_cast<const uint2 *>(layer.q_norm + 64 * i + 4 * i16);
      k_norm[i] = *reinterpret_cast<const uint2 *>(layer.k_norm + 64 * i + 4 * i16);
    }
  }
  const int thread = at.warp * 32 + at.lane;
  if (thread * 4 < TEAM_QKV) {
    uint4 four[1];
    const uint32_t *from = exchange.now + QKV_AT + at.team * TEAM_QKV + thread * 4;
    collect(four, [&](int) { return from; }, limit);
    *reinterpret_cast<uint4 *>(working.qkv + thread * 4) = four[0];
  }
  sync_threads(WORKERS);
  if (busy) attend_to_mine(a, layer, working, at, keys, values, q_norm, k_norm, read);
  sync_threads(WORKERS);

  // One output a block, in pairs of channels.
  if (thread >= TEAM_Q / 2) return;
  const int head = thread / (HEAD_DIM / 2);
  float top = NOTHING, sum = 0, x = 0, y = 0;
#pragma unroll 4
  for (int i = 0; i < a.active; i++) top = fmaxf(top, working.head_stats[i][head].x);
#pragma unroll 4
  for (int i = 0; i < a.active; i++) {
    const float2 stats = working.head_stats[i][head];
    const float2 o = *reinterpret_cast<const float2 *>(working.head_out[i] + 2 * thread);
    const float scale = power_of_two(stats.x - top);
    sum = fmaf(stats.y, scale, sum), x = fmaf(o.x, scale, x), y = fmaf(o.y, scale, y);
  }
  const int part =
      PARTS_AT + ((at.team * (TEAM_Q / 16) + thread / 8) * MEMBERS + at.member) * PART;
  exchange.put(part + lane_order(2 * (thread % 8)) / 2, pack(x, y));
  if (thread % 8 == 0) {
    exchange.put(part + 8, top);
    exchange.put(part + 9, sum);
  }
}

// 16 channels of the team's attention output, from all members' parts, as `multiply` takes them.
__device__ __forceinline__ uint2 attended(const Exchange &exchange, int step, const Place &at,
                                          uint32_t limit) {
  constexpr int MINE = MEMBERS / 8;
  const int column = at.lane / 4, q = at.lane % 4;
  const uint32_t *parts =
      exchange.now + PARTS_AT + ((at.team * (TEAM_Q / 16) + step) * MEMBERS + column) * PART;
  uint2 words[2 * MINE];
  collect(
      words, [&](int i) { return parts + i / 2 * 8 * PART + (i % 2 ? 8 : q * 2); }, limit);
  float top = NOTHING;
#pragma unroll
  for (int i = 0; i < MINE; i++) top = fmaxf(top, __uint_as_float(words[2 * i + 1].x));
  for (int offset = 4; offset < 32; offset *= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  float sum = 0, v[4] = {};
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const float2 a = unpack(words[2 * i].x), b = unpack(words[2 * i].y);
    const float scale = power_of_two(__uint_as_float(words[2 * i + 1].x) - top);
    sum = fmaf(__uint_as_float(words[2 * i + 1].y), scale, sum);
    v[0] = fmaf(a.x, scale, v[0]), v[1] = fmaf(a.y, scale, v[1]);
    v[2] = fmaf(b.x, scale, v[2]), v[3] = fmaf(b.y, scale, v[3]);
  }
  for (int offset = 4; offset < 32; offset *= 2) {
    sum += __shfl_xor_sync(~0u, sum, offset);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] += __shfl_xor_sync(~0u, v[i], offset);
  }
  const float scale = sum > 0 ? __fdividef(1.f, sum) : 0.f;  // no keys at all: a row that only pads
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] *= scale;
  return column % 2 ? make_uint2(pack_rest(v[0], v[1]), pack_rest(v[2], v[3]))
                    : make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
}

}  // namespace kvist
