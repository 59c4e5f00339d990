// A decode step of one sequence in one launch: all layers and the head, from a token id to logits.
//
// The grid is as many clusters of blocks as the GPU holds at once. In each block one warp streams
// the weights that the block will need, without a pause from the first layer to the head, while
// sixteen follow the data: q, k and v, attention's parts and the MLP's activations stay within a
// cluster and travel between its shared memories; what each cluster adds to the residual stream is
// published as words in memory, each of which says by itself whether it has been written. Sums have
// one order, so bits do not change from run to run. Loaded by kvist.kernels.cuda.
#include "attention.cuh"
#include "stream.cuh"

namespace kvist {

struct Step {
  const Layer *layers;
  const bf16 *embedding, *norm, *head;
  const int64_t *token, *position, *place;  // the place of the new token's keys and values
  const int32_t *length, *table;            // keys, the new one included; where its blocks are
  const float *frequencies;                 // [HEAD_DIM / 2]
  float *logits;
  uint32_t *exchange;                       // [2, 2 * num_layers, CLUSTERS, HIDDEN], ABSENT at first
  uint32_t *epoch;                          // steps done
  int32_t num_layers, vocab, block_size;
  uint32_t spin_limit;
  float eps, rotation_scale;
};

// What each cluster adds to the residual stream, from where it is computed to where it is needed.
struct Exchange {
  uint32_t *now, *next;  // this step's words, and those of the step after it

  __device__ Exchange(const Step &p) {
    const size_t half = static_cast<size_t>(2) * p.num_layers * CLUSTERS * HIDDEN;
    const uint32_t odd = *static_cast<volatile uint32_t *>(p.epoch) & 1;
    now = p.exchange + odd * half, next = p.exchange + (1 - odd) * half;
  }
  __device__ static size_t word(int turn, int cluster, int channel) {
    return (static_cast<size_t>(turn) * CLUSTERS + cluster) * HIDDEN + channel;
  }
  __device__ void put(int turn, int cluster, int channel, float value) {
    const size_t at = word(turn, cluster, channel);
    const uint32_t bits = __float_as_uint(value);
    publish(now + at, bits == ABSENT ? 0x7fffffffu : bits);
    publish(next + at, ABSENT);  // nobody looks there before this launch has ended
  }
};

// A warp's 32 channels of the residual stream: lane 8g + 4s + q holds channels 2q, 2q + 1, 2q + 8
// and 2q + 9 of the s-th 16, the four groups g the same.
struct Residual {
  float v[4];
  int first;  // channel

  __device__ Residual(const Place &at)
      : v{}, first(at.rank * SLICE + (at.warp - FIRST_GATHERER) * 32 + (at.lane / 4 % 2) * 16 +
                   2 * (at.lane % 4)) {}
  __device__ void begin(const bf16 *embedding) {
    const float2 a = unpack(*reinterpret_cast<const uint32_t *>(embedding + first));
    const float2 b = unpack(*reinterpret_cast<const uint32_t *>(embedding + first + 8));
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
  }
  // Add what the clusters computed, as it comes in; each group looks at a quarter of them.
  __device__ void gather(const Exchange &exchange, int turn, const Place &at, uint32_t limit) {
    constexpr int MINE = CLUSTERS / 4;
    uint2 a[MINE], b[MINE];
    bool absent;
    uint32_t tries = 0;
    do {
      absent = false;
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        const uint32_t *from =
            exchange.now + Exchange::word(turn, at.lane / 8 + 4 * i, first);
        a[i] = look(from), b[i] = look(from + 8);
      }
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        absent |= a[i].x == ABSENT || a[i].y == ABSENT || b[i].x == ABSENT || b[i].y == ABSENT;
      }
      if (tries++ > limit) give_up(turn);
    } while (absent);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      sum[0] += __uint_as_float(a[i].x), sum[1] += __uint_as_float(a[i].y);
      sum[2] += __uint_as_float(b[i].x), sum[3] += __uint_as_float(b[i].y);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sum[j] += __shfl_xor_sync(~0u, sum[j], 8);
      sum[j] += __shfl_xor_sync(~0u, sum[j], 16);
      v[j] += sum[j];
    }
  }
  // Send it, times a norm's weights, to the whole cluster; its scale is applied after the product.
  __device__ void spread(const bf16 *norm, Working &working, const Place &at) const {
    const float2 w = unpack(*reinterpret_cast<const uint32_t *>(norm + first));
    const float2 u = unpack(*reinterpret_cast<const uint32_t *>(norm + first + 8));
    const float a = v[0] * w.x, b = v[1] * w.y, c = v[2] * u.x, d = v[3] * u.y;
    const uint4 x = make_uint4(pack(a, b), pack(c, d), pack_rest(a, b), pack_rest(c, d));
    const float squares =
        sum_of(fmaf(v[0], v[0], fmaf(v[1], v[1], fmaf(v[2], v[2], v[3] * v[3]))), 8);
    const int four = first / 16 * 4 + at.lane % 4;
    const int index = at.rank * GATHERERS + at.warp - FIRST_GATHERER;
    const uint32_t to = shared_address(&working.x[four]);
    const uint32_t square = shared_address(&working.squares[index]);
    const uint32_t got = shared_address(&working.got_x);
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank += 4) {
      const uint32_t there = rank + at.lane / 8, barrier = at_rank(got, there);
      send(at_rank(to, there), x, barrier);
      if (at.lane % 8 == 0) send(at_rank(square, there), __float_as_uint(squares), barrier);
    }
  }
};

__device__ __forceinline__ float norm_scale(const Working &working, float eps) {
  float sum = 0;
#pragma unroll 8
  for (int i = 0; i < CLUSTER * GATHERERS; i++) sum += working.squares[i];
  return rsqrtf(sum / HIDDEN + eps);
}

// The warp that streams: the same products in the same order as `follow` computes them.
__device__ void stream(const Step &p, Ring ring, const Place &at) {
  const uint64_t policy = read_once_policy();
  const int cluster = at.cluster, rank = at.rank, kv_head = cluster / (CLUSTERS / KV_HEADS);
  for (int l = 0; l < p.num_layers; l++) {
    const Layer layer = p.layers[l];
    auto qkv = [&](int i) {
      int row = cluster * Q_HEADS * HEAD_DIM + rank * Q_ROWS + i;
      if (i >= Q_ROWS) row = HEADS * HEAD_DIM + kv_head * HEAD_DIM + rank * KV_ROWS + i - Q_ROWS;
      if (i >= Q_ROWS + KV_ROWS) row += KV_HEADS * HEAD_DIM - KV_ROWS;
      return layer.qkv + static_cast<size_t>(row) * HIDDEN;
    };
    auto out = [&](int i) {
      const size_t row = rank * SLICE + i;
      return layer.out + row * (HEADS * HEAD_DIM) + cluster * Q_HEADS * HEAD_DIM;
    };
    auto gate_up = [&](int i) {
      const int row = cluster * ACTS + rank * ACT_ROWS + i;
      return layer.gate_up +
             static_cast<size_t>(i < ACT_ROWS ? row : row + INTERMEDIATE - ACT_ROWS) * HIDDEN;
    };
    auto down = [&](int i) {
      const size_t row = rank * SLICE + i;
      return layer.down + row * INTERMEDIATE + cluster * ACTS;
    };
    fill<Qkv>(ring, qkv, Qkv::ROWS, policy, at.lane);
    fill<Out>(ring, out, Out::ROWS, policy, at.lane);
    fill<GateUp>(ring, gate_up, GateUp::ROWS, policy, at.lane);
    fill<Down>(ring, down, Down::ROWS, policy, at.lane);
  }
  for (int row = (cluster * CLUSTER + rank) * 16; row < p.vocab; row += BLOCKS * 16) {
    auto head = [&](int i) { return p.head + static_cast<size_t>(row + i) * HIDDEN; };
    fill<Head>(ring, head, least(16, p.vocab - row), policy, at.lane);
  }
}

// The warps that compute.
__device__ void follow(const Step &p, Ring ring, Working &working, const Place &at) {
  const int warp = at.warp, lane = at.lane, rank = at.rank;
  const uint32_t limit = p.spin_limit;
  const bool gathers = warp >= FIRST_GATHERER, arms = warp == 0 && lane == 0;
  const uint32_t got_x = shared_address(&working.got_x);
  const uint32_t got_parts = shared_address(&working.got_parts);
  const uint32_t got_acts = shared_address(&working.got_acts);
  uint32_t x_parity = 0;
  Exchange exchange(p);
  Residual residual(at);
  Attention attention(p.table, p.block_size, *p.length, *p.place, p.eps, at);
  if (const int i = warp * 32 + lane; i < HEAD_DIM / 2) {
    float sine, cosine;
    sincosf(static_cast<float>(*p.position) * p.frequencies[i], &sine, &cosine);
    working.rotation[i] = cosine * p.rotation_scale;
    working.rotation[HEAD_DIM / 2 + i] = sine * p.rotation_scale;
  }

  auto channels = [&](int step) {  // of x
    const uint32_t *four = reinterpret_cast<const uint32_t *>(&working.x[step * 4 + lane % 4]);
    return *reinterpret_cast<const uint2 *>(four + (lane / 4 % 2) * 2);
  };
  auto wait_for_x = [&]() {
    barrier_wait(got_x, x_parity, limit);
    if (arms) barrier_expect(got_x, X_BYTES);
    x_parity ^= 1;
  };
  // Add a product's sums to the residual stream: its rows are channels of this block's slice.
  auto publish_sums = [&](int turn) {
    sync_threads(WORKERS);
    if (const int row = warp * 32 + lane; row < SLICE) {
      exchange.put(turn, at.cluster, rank * SLICE + row, total(working.sums[1], row));
    }
  };

  attention.prefetch(p.layers[0], rank);
  if (gathers) residual.begin(p.embedding + *p.token * HIDDEN);
  for (int l = 0; l < p.num_layers; l++) {
    const Layer &layer = p.layers[l];
    const uint32_t parity = l & 1;

    // q, k and v of the cluster's heads.
    if (gathers) {
      if (l) residual.gather(exchange, 2 * l - 1, at, limit);
      residual.spread(layer.input_norm, working, at);
    }
    wait_for_x();
    multiply<Qkv>(ring, channels, working.sums[0][warp], warp, lane);
    const float qkv_scale = warp < SENDERS ? norm_scale(working, p.eps) : 0.f;
    sync_threads(WORKERS);
    if (warp < SENDERS) {
      for (int row = lane; row < Qkv::ROWS; row += 32) {
        int to = rank * Q_ROWS + row;
        if (row >= Q_ROWS) to = Q_HEADS * HEAD_DIM + rank * KV_ROWS + row - Q_ROWS;
        if (row >= Q_ROWS + KV_ROWS) to += HEAD_DIM - KV_ROWS;
        const uint32_t value = __float_as_uint(total(working.sums[0], row) * qkv_scale);
        const uint32_t address = shared_address(&working.qkv[to]);
        const uint32_t got = shared_address(&working.got_qkv);
#pragma unroll
        for (int there = warp; there < CLUSTER; there += SENDERS) {
          send(at_rank(address, there), value, at_rank(got, there));
        }
      }
    }
    if (l + 1 < p.num_layers) attention.prefetch(p.layers[l + 1], rank);

    attend(attention, layer, working, at, parity, limit);

    // The cluster's heads' part of the output projection.
    barrier_wait(got_parts, parity, limit);
    if (arms) barrier_expect(got_parts, PART_BYTES);
    auto parts = [&](int step) { return attended(working, step, lane); };
    multiply<Out>(ring, parts, working.sums[1][warp], warp, lane);
    publish_sums(2 * l);

    // The cluster's columns of the MLP.
    if (gathers) {
      residual.gather(exchange, 2 * l, at, limit);
      residual.spread(layer.mlp_norm, working, at);
    }
    wait_for_x();
    multiply<GateUp>(ring, channels, working.sums[0][warp], warp, lane);
    const float mlp_scale = warp < SENDERS ? norm_scale(working, p.eps) : 0.f;
    sync_threads(WORKERS);
    if (warp < SENDERS) {
      for (int row = lane; row < ACT_ROWS; row += 32) {
        const float gate = total(working.sums[0], row) * mlp_scale;
        const float up = total(working.sums[0], row + ACT_ROWS) * mlp_scale;
        const uint32_t value = __float_as_uint(gate / (1.f + __expf(-gate)) * up);
        const uint32_t address = shared_address(&working.acts[rank * ACT_ROWS + row]);
#pragma unroll
        for (int there = warp; there < CLUSTER; there += SENDERS) {
          send(at_rank(address, there), value, at_rank(got_acts, there));
        }
      }
    }
    barrier_wait(got_acts, parity, limit);
    if (arms) barrier_expect(got_acts, ACT_BYTES);
    auto acts = [&](int step) {
      const float2 a = *reinterpret_cast<const float2 *>(working.acts + step * 16 + lane % 4 * 2);
      const float2 b = *reinterpret_cast<const float2 *>(working.acts + step * 16 + 8 + lane % 4 * 2);
      return lane / 4 % 2 ? make_uint2(pack_rest(a.x, a.y), pack_rest(b.x, b.y))
                          : make_uint2(pack(a.x, a.y), pack(b.x, b.y));
    };
    multiply<Down>(ring, acts, working.sums[1][warp], warp, lane);
    publish_sums(2 * l + 1);
  }

  if (gathers) {
    residual.gather(exchange, 2 * p.num_layers - 1, at, limit);
    residual.spread(p.norm, working, at);
  }
  barrier_wait(got_x, x_parity, limit);
  const float scale = norm_scale(working, p.eps);
  int turn = 0;
  for (int row = (at.cluster * CLUSTER + rank) * 16; row < p.vocab; row += BLOCKS * 16, turn++) {
    const int buffer = turn % 2 * 16;  // a warp may be late in summing the tile before
    multiply<Head>(ring, channels, working.sums[0][warp] + buffer, warp, lane);
    sync_threads(WORKERS);
    if (warp == turn % WARPS && lane < 16 && row + lane < p.vocab) {
      p.logits[row + lane] = total(working.sums[0], buffer + lane) * scale;
    }
  }
}

__global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Step p) {
  extern __shared__ unsigned char memory[];
  Shared &shared = *reinterpret_cast<Shared *>(
      memory + (128 - shared_address(memory) % 128) % 128);
  Working &working = shared.working;
  const Place at = {static_cast<int>(threadIdx.x / 32), static_cast<int>(threadIdx.x % 32),
                    cluster_index(), cluster_rank()};
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), WARPS);
    }
    for (uint64_t *one : {&working.got_x, &working.got_qkv, &working.got_parts, &working.got_acts}) {
      barrier_init(shared_address(one), 1);
    }
    barriers_visible();
    barrier_expect(shared_address(&working.got_x), X_BYTES);
    barrier_expect(shared_address(&working.got_qkv), QKV_BYTES);
    barrier_expect(shared_address(&working.got_parts), PART_BYTES);
    barrier_expect(shared_address(&working.got_acts), ACT_BYTES);
  }
  cluster_sync();
  const Ring ring(shared, p.spin_limit);
  if (at.warp == WARPS) {
    stream(p, ring, at);
  } else {
    follow(p, ring, working, at);
  }
  __syncwarp();
  cluster_sync();  // no block leaves while another may still send to it
  // All blocks have read it: what they exchanged since was needed to come here.
  if (blockIdx.x == 0 && threadIdx.x == 0) publish(p.epoch, *p.epoch + 1);
}

cudaLaunchConfig_t launch_config(cudaLaunchAttribute (&attributes)[2], cudaStream_t stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = CLUSTER;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(BLOCKS), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(Shared) + 128;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

}  // namespace kvist

extern "C" {

// Of these declarations; kvist.kernels.cuda refuses a library of another.
int32_t kvist_one_launch_interface() { return 1; }

// Bytes of a Step and of a Layer, for the caller to compare with its own.
int32_t kvist_one_launch_step_bytes() { return sizeof(kvist::Step); }
int32_t kvist_one_launch_layer_bytes() { return sizeof(kvist::Layer); }

// Prepare the kernel on the current device: how many of its clusters that holds at once, or minus
// an error of CUDA's.
int32_t kvist_one_launch_prepare() {
  using namespace kvist;
  auto *kernel = reinterpret_cast<const void *>(decode_step);
  const int bytes = sizeof(Shared) + 128;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = launch_config(attributes, nullptr);
  config.numAttrs = 1;
  int clusters = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  cudaGetLastError();
  return error == cudaSuccess ? clusters : -static_cast<int32_t>(error);
}

// Start a step on a stream; 0, or an error of CUDA's.
int32_t kvist_one_launch(const kvist::Step *step, void *stream) {
  using namespace kvist;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(attributes, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaLaunchKernelEx(&config, decode_step, *step);
  cudaGetLastError();
  return error;
}

const char *kvist_one_launch_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
