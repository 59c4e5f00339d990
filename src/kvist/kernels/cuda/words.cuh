// Numbers in words: what is waited for, and what is left of a float that is rounded.
#pragma once
#include "ptx.cuh"

namespace kvist {

// A word that no arithmetic leaves behind (its NaN is 0x7fffffff): "not written yet".
constexpr uint32_t ABSENT = 0xffffffffu;

__device__ __forceinline__ bool absent(uint4 v) {
  return v.x == ABSENT || v.y == ABSENT || v.z == ABSENT || v.w == ABSENT;
}

__device__ __forceinline__ bool absent(uint2 v) { return v.x == ABSENT || v.y == ABSENT; }

// Wait until all of some words are there; `from(i)` is where the i-th few are.
template <int N, class Words, class From>
__device__ __forceinline__ void collect(Words (&v)[N], From from, uint32_t limit) {
  bool again;
  uint32_t tries = 0;
  do {
    again = false;
#pragma unroll
    for (int i = 0; i < N; i++) look(v[i], from(i));
#pragma unroll
    for (int i = 0; i < N; i++) again |= absent(v[i]);
    if (tries++ > limit) give_up(N);
  } while (again);
}

// What rounding to bfloat16 loses, itself in bfloat16: the two have 16 bits between them.
__device__ __forceinline__ uint32_t pack_rest(float low, float high) {
  float2 kept = unpack(pack(low, high));
  return pack(low - kept.x, high - kept.y);
}

// Over groups of `lanes` neighbouring lanes.
__device__ __forceinline__ float sum_of(float v, int lanes) {
  for (int offset = lanes / 2; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

}  // namespace kvist
