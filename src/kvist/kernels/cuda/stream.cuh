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

// Copy what `Product` reads, once there is room; `row(i)` is where row i begins. One warp calls it.
template <class P, class Row>
__device__ __forceinline__ void fill(Ring &ring, Row row, int rows, uint64_t policy) {
#pragma unroll 1
  for (int first = 0; first < rows; first += P::BLOCK_ROWS) {
    const int count = least(P::BLOCK_ROWS, rows - first);
#pragma unroll 1
    for (int part = 0; part < P::PARTS; part++) {
      const uint32_t full = ring.full + ring.slot * 8, to = ring.slots + ring.slot * SLOT;
      barrier_wait(ring.empty + ring.slot * 8, ring.parity ^ 1, ring.limit);
      // The copy engine takes its operands from registers that a warp has in common: one lane has
      // to start all copies, or the compiler makes them a loop over lanes.
      if (elected()) {
        barrier_expect(full, count * P::WIDTH * 2);
#pragma unroll 4
        for (int i = 0; i < count; i++) {
          copy_in(to + i * P::PITCH, row(first + i) + part * P::WIDTH, P::WIDTH * 2, full, policy);
        }
      }
      __syncwarp();
      ring.advance();
    }
  }
}

// A block's rows times a vector; each warp multiplies its share of the columns and leaves its sums
// in `sums[row]`. `operand(part, i)` is the vector's 16 channels of the warp's i-th step as the
// tensor cores take them: in their columns 0 and 1 (lanes 0 to 3 and 4 to 7) the channels and what
// rounding them to bfloat16 lost; the other columns are computed and left.
template <class P, class Operand>
__device__ __forceinline__ void multiply(Ring &ring, Operand operand, float *sums, int warp,
                                         int lane) {
  const int begin = P::begin(warp), end = P::end(warp);
  const uint32_t offset = (lane & 15) * P::PITCH + (lane >> 4) * 16;
  // Several slots' products are under way at once, and a tile's even and odd steps.
  constexpr int GROUP = least(P::ROW_BLOCKS, most(1, 4 / P::TILES));
#pragma unroll 1
  for (int first = 0; first < P::ROW_BLOCKS; first += GROUP) {
    float acc[GROUP][P::TILES][2][4] = {};
#pragma unroll
    for (int block = 0; block < GROUP; block++) {
      if (first + block >= P::ROW_BLOCKS) break;
#pragma unroll
      for (int part = 0; part < P::PARTS; part++) {
        const uint32_t from = ring.slots + ring.slot * SLOT + offset + begin * 32;
        barrier_wait(ring.full + ring.slot * 8, ring.parity, ring.limit);
#pragma unroll
        for (int i = 0; i < P::MOST_STEPS; i++) {
          if (P::STEPS % WARPS == 0 || begin + i < end) {
            const uint2 b = operand(part, i);
#pragma unroll
            for (int tile = 0; tile < P::TILES; tile++) {
              if ((first + block) * P::BLOCK_ROWS + tile * 16 < P::ROWS) {
                const uint4 a = load_matrices(from + tile * 16 * P::PITCH + i * 32);
                multiply_add(acc[block][tile][i % 2], a, b);
              }
            }
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.empty + ring.slot * 8);
        ring.advance();
      }
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int block = 0; block < GROUP; block++) {
#pragma unroll
        for (int tile = 0; tile < P::TILES; tile++) {
          const int row = (first + block) * P::BLOCK_ROWS + tile * 16;
          const auto &c = acc[block][tile];
          if (row < P::ROWS) {
            sums[row + lane / 4] = (c[0][0] + c[1][0]) + (c[0][1] + c[1][1]);
            sums[row + lane / 4 + 8] = (c[0][2] + c[1][2]) + (c[0][3] + c[1][3]);
          }
        }
      }
    }
  }
}

// A row's sum over all warps, in the order of the warps.
__device__ __forceinline__ float total(const float (*sums)[MOST_ROWS], int row) {
  float a = 0, b = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp += 2) a += sums[warp][row], b += sums[warp + 1][row];
  return a + b;
}

}  // namespace kvist
