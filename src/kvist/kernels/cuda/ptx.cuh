// The instructions that CUDA C++ has no name for: barriers, the copy engine, words that blocks
// exchange, tensor core products. One line each; nothing here knows a model. Tests put another file
// in its place, with which the kernels run on a CPU.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>
#ifdef KVIST_TELL
#include <stdio.h>
#endif

namespace kvist {

using bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One lane of a warp, of which the compiler knows that it is one.
__device__ __forceinline__ bool elected() {
  uint32_t one;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(one));
  return one;
}

// Powers of two and quotients as the hardware has them, to some 22 bits.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of the first `threads` threads of a block, which are whole warps.
__device__ __forceinline__ void sync_threads(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// To the copy engine as well.
__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and have the barrier wait for so many bytes as well.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Where waits end that would not end otherwise: the host sees an error, not a GPU that hangs.
// -DKVIST_TELL says which it was, by its address.
__device__ __forceinline__ void give_up(uint32_t address) {
#ifdef KVIST_TELL
  printf("block %d thread %d waited in vain at %u\n", blockIdx.x, threadIdx.x, address);
#endif
  __trap();
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity, uint32_t limit) {
  uint32_t done = 0;
  for (uint32_t tries = 0;; tries++) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
    if (tries > limit) give_up(barrier);
  }
}

__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Have the second level cache hold a line.
__device__ __forceinline__ void prefetch_line(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Global memory to shared memory by the copy engine; `bytes` is a multiple of 16.
__device__ __forceinline__ void copy_in(uint32_t to, const void *from, uint32_t bytes,
                                        uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Words that all blocks see. No order is promised between them: each tells by itself whether it has
// been written, since it was ABSENT before.
__device__ __forceinline__ void publish(uint32_t *p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

__device__ __forceinline__ void look(uint4 &v, const uint32_t *p) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
}

__device__ __forceinline__ void look(uint2 &v, const uint32_t *p) {
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; each lane names a row of 16 bytes.
__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
               : "r"(address)
               : "memory");
  return a;
}

// c += a b: a 16 x 16, b 16 x 8 in bfloat16, c 16 x 8 in float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], uint4 a, uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

}  // namespace kvist
