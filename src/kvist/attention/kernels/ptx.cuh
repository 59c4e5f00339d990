// What decode.cu does with single instructions: barriers, copies, products, conversions.

#pragma once

#include "items.cuh"

enum { FP8 = 1, INT8, INT4 };  // as formats.py has them

__device__ __forceinline__ u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }
__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Wait until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nwaiting:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra waiting;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}
__device__ __forceinline__ void bring(u32 to, const char *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two numbers as an operand of the products.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
__device__ __forceinline__ float of_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// A number of the model's own dtype.
__device__ __forceinline__ float of_model(u16 x) {
#if MODEL_BFLOAT
    return __uint_as_float((u32)x << 16);
#else
    return of_half(x);
#endif
}
__device__ __forceinline__ u16 to_model(float x) {
    u16 y;
#if MODEL_BFLOAT
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
}
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 minus(u32 x, u32 y) {
    u32 z;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ __forceinline__ float across_keys_max(float x) {
    for (int step = 4; step < LANES; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}
__device__ __forceinline__ float across_keys_sum(float x) {
    for (int step = 4; step < LANES; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Bytes to pairs of float16: the low two of x, the high two.
template <int KIND> __device__ __forceinline__ void halves(u32 x, u32 &low, u32 &high) {
    if constexpr (KIND == FP8) {
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((u16)x));
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((u16)(x >> 16)));
    } else {
        // 1024 + 128 + x has the bits of x ^ 0x80 as its low mantissa byte.
        x ^= 0x80808080u;
        low = minus(__byte_perm(x, 0x64646464u, 0x4140), 0x64806480u);
        high = minus(__byte_perm(x, 0x64646464u, 0x4342), 0x64806480u);
    }
}
// Low nibbles of bytes 0 and 2 as 1024 + n; high ones as 1024 + 16 n.
__device__ __forceinline__ u32 low_nibbles(u32 x) { return (x & 0x000F000Fu) | 0x64006400u; }
__device__ __forceinline__ u32 high_nibbles(u32 x) { return (x & 0x00F000F0u) | 0x64006400u; }
