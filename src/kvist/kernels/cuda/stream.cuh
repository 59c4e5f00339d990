// Weights on their way from memory to the tensor cores: a ring of slots in shared memory that one
// warp fills, in the order in which the others use them, as far ahead as there is room.
#pragma once
#include "shape.cuh"

namespace kvist {

struct Ring {
  uint32_t slots, full, empty;  // addresses
  uint32_t slot, parity;        // where this thread is
  uint32_t limit;               // of a wait

  __device__ Ring(Shared &shared, uint32_t limit)
      : slots(shared_address(shared.slots)), full(shared_address(shared.full)),
        empty(shared_address(shared.empty)), slot(0), parity(0), limit(limit) {}
  __device__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

// Rows of a matrix, by address: consecutive ones, but for two places where some are passed over.
struct Rows {
  const bf16 *first;         // of row 0, the first column wanted
  int pitch;                 // of the matrix, in channels
  int from, break1, skip1, break2, skip2;

  __device__ const bf16 *row(int i) const {
    const int at = from + i + (i >= break1 ? skip1 : 0) + (i >= break2 ? skip2 : 0);
    return first + static_cast<size_t>(at) * pitch;
  }
  __device__ int end_of_run(int i) const {
    return i < break1 ? break1 : i < break2 ? break2 : 1 << 30;
  }
};

// Copy `count` rows into the slots that a product will look for, as soon as there is room; the ring
// as it is afterwards. One warp calls it. Not inlined: what instructions it takes would push out
// those that the other warps need.
__device__ __noinline__ Ring filled(Ring ring, const Rows rows, int count, int width, int parts,
                                    int block_rows, uint64_t policy) {
  const int pitch = width * 2 + 16, bytes = width * 2;
#pragma unroll 1
  for (int first = 0; first < count; first += block_rows) {
    const int end = least(first + block_rows, count);
#pragma unroll 1
    for (int part = 0; part < parts; part++) {
      const uint32_t full = ring.full + ring.slot * 8;
      barrier_wait(ring.empty + ring.slot * 8, ring.parity ^ 1, ring.limit);
      // The copy engine takes its operands from registers that a warp has in common: one lane has
      // to start all copies, or the compiler makes them a loop over lanes. Eight at a time, for
      // each of which there is little to compute.
      if (elected()) {
        barrier_expect(full, (end - first) * bytes);
        uint32_t to = ring.slots + ring.slot * SLOT;
#pragma unroll 1
        for (int i = first; i < end;) {
          const bf16 *from = rows.row(i) + part * width;
          int some = least(end, rows.end_of_run(i)) - i;
          i += some;
#pragma unroll 1
          for (; some >= 8; some -= 8, from += 8 * rows.pitch, to += 8 * pitch) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
              copy_in(to + j * pitch, from + j * rows.pitch, bytes, full, policy);
            }
          }
#pragma unroll 1
          for (; some > 0; some--, from += rows.pitch, to += pitch) {
            copy_in(to, from, bytes, full, policy);
          }
        }
      }
      __syncwarp();
      ring.advance();
    }
  }
  return ring;
}

template <class P>
__device__ __forceinline__ void fill(Ring &ring, const Rows &rows, int count, uint64_t policy) {
  ring = filled(ring, rows, count, P::WIDTH, P::PARTS, P::BLOCK_ROWS, policy);
}

// A block's rows times a vector; each warp multiplies its share of the columns and leaves its sums
// in `sums[row * SUMS_PITCH]`. `operand(part, i)` is the vector's 16 channels of the warp's i-th step
// as the tensor cores take them: in their columns 0 and 1 (lanes 0 to 3 and 4 to 7) the channels and
// what rounding them to bfloat16 lost; the other columns are computed and left.
template <class P, class Operand>
__device__ __forceinline__ void multiply(Ring &ring, Operand operand, float *sums, int rows,
                                         int warp, int lane) {
  const int begin = P::begin(warp), end = P::end(warp);
  const uint32_t offset = (lane & 15) * P::PITCH + (lane >> 4) * 16 + begin * 32;
#pragma unroll 1
  for (int first = 0; first < rows; first += P::BLOCK_ROWS) {
    float acc[P::TILES][2][4] = {};  // of even and odd steps, which need not wait for each other
#pragma unroll
    for (int part = 0; part < P::PARTS; part++) {
      const uint32_t from = ring.slots + ring.slot * SLOT + offset;
      barrier_wait(ring.full + ring.slot * 8, ring.parity, ring.limit);
#pragma unroll
      for (int i = 0; i < P::MOST_STEPS; i++) {
        if (P::STEPS % WARPS == 0 || begin + i < end) {
          const uint2 b = operand(part, i);
#pragma unroll
          for (int tile = 0; tile < P::TILES; tile++) {
            // Rows behind the last are whatever stands there; nobody asks for their sums.
            multiply_add(acc[tile][i % 2], load_matrices(from + tile * 16 * P::PITCH + i * 32), b);
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty + ring.slot * 8);
      ring.advance();
    }
    if (lane % 4 == 0) {
      float *to = sums + (first + lane / 4) * SUMS_PITCH;
#pragma unroll
      for (int tile = 0; tile < P::TILES; tile++) {
        const auto &c = acc[tile];
        to[tile * 16 * SUMS_PITCH] = (c[0][0] + c[1][0]) + (c[0][1] + c[1][1]);
        to[(tile * 16 + 8) * SUMS_PITCH] = (c[0][2] + c[1][2]) + (c[0][3] + c[1][3]);
      }
    }
  }
}

// The sum of a number of each warp, always in the same order.
__device__ __forceinline__ float total(const float *of_warps) {
  float4 sum = *reinterpret_cast<const float4 *>(of_warps);
#pragma unroll
  for (int warp = 4; warp < WARPS; warp += 4) {
    const float4 more = *reinterpret_cast<const float4 *>(of_warps + warp);
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

}  // namespace kvist
