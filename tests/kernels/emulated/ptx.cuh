// Stands in for kvist's ptx.cuh: the same functions by host code, and enough of CUDA C++ that a g++
// or clang++ compiles the kernels. A launch runs the whole grid on one core, every thread a context
// of its own that gives way where it would wait; the order in which they run is shuffled by a seed.
// What this cannot show is a GPU's memory ordering, its alignment rules, and speed.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct __nv_bfloat16 { uint16_t bits; };

namespace emulated {

struct Index { unsigned x; };

// One rendezvous of all threads of a group, which may pass on a value of each.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t in[32][10], out[32][10];  // what lanes bring to an instruction of the whole warp
};

struct Block {
  std::vector<unsigned char> memory;
  Meeting barriers[2];
  std::vector<Warp> warps;
};

struct Thread {
  jmp_buf state;
  ucontext_t begin;
  unsigned char *stack;
  Block *block;
  Index thread, index;
  bool started = false, ended = false;
};

constexpr size_t STACK = 64 * 1024;
inline jmp_buf scheduler;
inline ucontext_t origin;
inline Thread *current;
inline bool failed;
inline std::function<void()> body;
inline int block_threads;

// Let others run; after a failure nobody comes back.
inline void give_way() {
  if (!_setjmp(current->state)) _longjmp(scheduler, 1);
}

inline void meet(Meeting &meeting, int count) {
  const unsigned turn = meeting.turn;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, meeting.turn++;
    return;
  }
  while (meeting.turn == turn) give_way();
}

inline Warp &warp() { return current->block->warps[current->thread.x / 32]; }

// Bring words, and see those of all lanes until the warp's next meeting is over.
template <int N>
const uint32_t (*bring(const uint32_t (&words)[N]))[10] {
  Warp &w = warp();
  memcpy(w.in[current->thread.x % 32], words, sizeof words);
  if (w.meeting.arrived == 31) memcpy(w.out, w.in, sizeof w.in);
  meet(w.meeting, 32);
  return w.out;
}

inline void enter() {
  body();
  current->ended = true;
  _longjmp(scheduler, 1);
}

// Run a grid; false if a thread gave up, or all wait for each other.
inline bool run(int blocks, int threads, size_t shared, unsigned seed) {
  std::vector<std::unique_ptr<Block>> grid;
  std::vector<Thread> all(static_cast<size_t>(blocks) * threads);
  const size_t bytes = all.size() * STACK;
  void *stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return false;
  for (int b = 0; b < blocks; b++) {
    grid.push_back(std::make_unique<Block>());
    grid[b]->memory.assign(shared, 0xff);  // NaN, for who reads what nobody wrote
    grid[b]->warps.resize(threads / 32);
    for (int t = 0; t < threads; t++) {
      Thread &one = all[static_cast<size_t>(b) * threads + t];
      one.block = grid[b].get(), one.thread.x = t, one.index.x = b;
      one.stack = static_cast<unsigned char *>(stacks) + (&one - all.data()) * STACK;
    }
  }
  failed = false, block_threads = threads;
  std::vector<Thread *> running;
  for (Thread &one : all) running.push_back(&one);
  std::mt19937 random(seed);
  for (volatile int sweep = 0; !running.empty() && !failed; sweep = sweep + 1) {
    if (sweep % 64 == 0) std::shuffle(running.begin(), running.end(), random);
    for (volatile size_t i = 0; i < running.size() && !failed; i = i + 1) {
      current = running[i];
      if (_setjmp(scheduler)) continue;
      if (current->started) _longjmp(current->state, 1);
      current->started = true;
      getcontext(&current->begin);
      current->begin.uc_stack.ss_sp = current->stack, current->begin.uc_stack.ss_size = STACK;
      current->begin.uc_link = nullptr;
      makecontext(&current->begin, enter, 0);
      setcontext(&current->begin);
    }
    std::erase_if(running, [](Thread *one) { return one->ended; });
  }
  munmap(stacks, bytes);
  return !failed;
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->index)

inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
#define __float_as_uint bits_of
#define __uint_as_float float_of
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <class T> T __ldcg(const T *p) { return *p; }
inline void __syncwarp() { emulated::meet(emulated::warp().meeting, 32); }
inline void __syncthreads() {
  emulated::meet(emulated::current->block->barriers[0], emulated::block_threads);
}
inline float __shfl_xor_sync(uint32_t, float value, int offset) {
  return float_of(emulated::bring({bits_of(value)})[threadIdx.x % 32 ^ offset][0]);
}
inline bool __any_sync(uint32_t, bool value) {
  const auto lanes = emulated::bring({uint32_t(value)});
  bool any = false;
  for (int i = 0; i < 32; i++) any |= lanes[i][0];
  return any;
}

// The runtime's part of the kernels' C interface.
using cudaError_t = int;
using cudaStream_t = void *;
struct dim3 { unsigned x; explicit dim3(unsigned x = 1) : x(x) {} };
constexpr int cudaSuccess = 0, cudaErrorLaunchFailure = 719, cudaErrorCooperativeLaunchTooLarge = 720;
constexpr int cudaLaunchAttributeCooperative = 0, cudaDevAttrMultiProcessorCount = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
struct cudaLaunchAttribute { int id; struct { int cooperative; } val; };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  int numAttrs;
};
inline int cudaFuncSetAttribute(const void *, int, int) { return cudaSuccess; }
inline int cudaGetDevice(int *device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int *value, int, int) { return *value = 1 << 20, cudaSuccess; }
inline int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, int) {
  return *n = 1, cudaSuccess;
}
inline int cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(int) { return "a thread gave up"; }
template <class Argument>
int cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Argument), Argument one) {
  emulated::body = [=] { kernel(one); };
  const unsigned seed = static_cast<unsigned>(reinterpret_cast<uintptr_t>(config->stream));
  const bool well = emulated::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                                  seed);
  return well ? cudaSuccess : cudaErrorLaunchFailure;
}

namespace kvist {

using bf16 = __nv_bfloat16;

inline unsigned char *shared_memory() { return emulated::current->block->memory.data(); }
inline uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(static_cast<const unsigned char *>(p) - shared_memory());
}
inline bool elected() { return threadIdx.x % 32 == 0; }
inline float power_of_two(float x) { return exp2f(x); }
inline void sync_threads(int threads) {
  emulated::meet(emulated::current->block->barriers[1], threads);
}

struct Barrier {
  uint8_t expected;
  int8_t pending;
  uint8_t phase, unused;
  int32_t bytes;

  static Barrier &at(uint32_t address) {
    return *reinterpret_cast<Barrier *>(shared_memory() + address);
  }
  void look_up() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = static_cast<int8_t>(expected);
  }
};
static_assert(sizeof(Barrier) == 8);

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  Barrier::at(barrier) = {static_cast<uint8_t>(arrivals), static_cast<int8_t>(arrivals), 0, 0, 0};
}
inline void barriers_visible() {}
inline void barrier_arrive(uint32_t barrier) {
  Barrier &one = Barrier::at(barrier);
  one.pending--, one.look_up();
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  Barrier &one = Barrier::at(barrier);
  one.bytes += static_cast<int32_t>(bytes), one.pending--, one.look_up();
}
inline void give_up(uint32_t) {
  emulated::failed = true;
  emulated::give_way();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, uint32_t limit) {
  for (uint32_t tries = 0; Barrier::at(barrier).phase == parity; tries++) {
    if (tries > limit) give_up(barrier);
    emulated::give_way();
  }
}
inline uint64_t read_once_policy() { return 0; }
inline void prefetch_line(const void *) {}
inline void copy_in(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier, uint64_t) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) give_up(to);
  memcpy(shared_memory() + to, from, bytes);
  Barrier::at(barrier).bytes -= static_cast<int32_t>(bytes);
  Barrier::at(barrier).look_up();
  emulated::give_way();
}
inline void publish(uint32_t *p, uint32_t value) { *p = value; }
template <class Words>
void look(Words &words, const uint32_t *p) {
  emulated::give_way();
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Words)) give_up(0);
  memcpy(&words, p, sizeof words);
}

inline float2 unpack(uint32_t pair) {
  return {float_of(pair << 16), float_of(pair & 0xffff0000u)};
}
inline uint32_t rounded(float x) {  // to bfloat16, ties to even
  const uint32_t bits = bits_of(x);
  return isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack(float low, float high) { return rounded(low) | rounded(high) << 16; }

inline uint4 load_matrices(uint32_t address) {
  if (address % 16) give_up(address);
  const auto lanes = emulated::bring({address});
  uint32_t words[4];
  for (int i = 0; i < 4; i++) {
    const int lane = threadIdx.x % 32;
    memcpy(&words[i], shared_memory() + lanes[i * 8 + lane / 4][0] + lane % 4 * 4, 4);
  }
  return {words[0], words[1], words[2], words[3]};
}

inline void multiply_add(float (&c)[4], uint4 a, uint2 b) {
  const auto lanes = emulated::bring({a.x, a.y, a.z, a.w, b.x, b.y});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k += 2) {
      const float2 x = unpack(lanes[row * 4 + k % 8 / 2][i / 2 + k / 8 * 2]);
      const float2 y = unpack(lanes[column * 4 + k % 8 / 2][4 + k / 8]);
      c[i] += x.x * y.x + x.y * y.y;
    }
  }
}

}  // namespace kvist
