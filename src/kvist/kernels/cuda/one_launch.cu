// A decode step of one sequence in one launch: all layers and the head, from a token id to logits.
//
// A block runs on each of 128 multiprocessors. In each, one warp streams the weights that the block
// will need, without a pause from the first layer to the head, while sixteen follow the data: what a
// block computes it publishes as words in memory, each of which says by itself whether it has been
// written, and whoever needs words waits for just those. Sums have one order, so bits do not change
// from run to run. Loaded by kvist.kernels.cuda.
#include "attention.cuh"
#include "stream.cuh"

namespace kvist {

struct Step {
  const bf16 *embedding, *norm, *head;
  const int64_t *token, *position, *place;  // the place of the new token's keys and values
  const int32_t *length, *table;            // keys, the new one included; where its blocks are
  const float *frequencies;                 // [HEAD_DIM / 2]
  float *logits;
  uint32_t *exchange;                       // [2, num_layers, LAYER_WORDS], ABSENT at first
  uint32_t *epoch;                          // steps done
  int32_t num_layers, vocab, block_size;
  uint32_t spin_limit;
  float eps, rotation_scale;
  Layer layers[MOST_LAYERS];
};

// A warp's share of the residual stream, which all blocks hold: in units of 32 channels, of which
// lane 8g + 4s + q has channels 2q, 2q + 1, 2q + 8 and 2q + 9 of the s-th 16, for units g, g + 4 ….
// They are those that the warp will multiply.
struct Residual {
  static constexpr int UNITS = HIDDEN / (32 * WARPS), OF_PART = X_WIDTH / (32 * WARPS);
  static constexpr int MINE = (UNITS + 3) / 4;
  float v[MINE][4];

  __device__ static bool has(int i, int lane) { return 4 * i + lane / 8 < UNITS; }
  __device__ static int first(int i, const Place &at) {  // channel of the i-th unit
    const int unit = least(4 * i + at.lane / 8, UNITS - 1);
    return unit / OF_PART * X_WIDTH + at.warp * (X_WIDTH / WARPS) + unit % OF_PART * 32;
  }
  // Four numbers of each unit, of a vector in bfloat16.
  __device__ static void read(uint2 (&to)[MINE], const bf16 *from, const Place &at) {
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const bf16 *two = from + first(i, at) + at.lane / 4 % 2 * 16 + at.lane % 4 * 2;
      to[i].x = *reinterpret_cast<const uint32_t *>(two);
      to[i].y = *reinterpret_cast<const uint32_t *>(two + 8);
    }
  }
  __device__ void begin(const bf16 *embedding, const Place &at) {
    uint2 pairs[MINE];
    read(pairs, embedding, at);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const float2 a = unpack(pairs[i].x), b = unpack(pairs[i].y);
      v[i][0] = a.x, v[i][1] = a.y, v[i][2] = b.x, v[i][3] = b.y;
    }
  }
  // Add what all teams computed.
  __device__ void gather(const Exchange &exchange, int turn, const Place &at, uint32_t limit) {
    uint4 words[MINE];
    const uint32_t *totals = exchange.now + TOTALS_AT + turn * HIDDEN + at.lane % 8 * 4;
    collect(words, [&](int i) { return totals + first(i, at); }, limit);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      v[i][0] += __uint_as_float(words[i].x), v[i][1] += __uint_as_float(words[i].y);
      v[i][2] += __uint_as_float(words[i].z), v[i][3] += __uint_as_float(words[i].w);
    }
  }
  // Leave it, times a norm's weights, for this warp's products; the norm's scale, which depends on
  // all warps, is applied after them.
  __device__ void normalise(const uint2 (&weights)[MINE], Working &working, const Place &at) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      if (!has(i, at.lane)) continue;
      const float2 w = unpack(weights[i].x), u = unpack(weights[i].y);
      const float a = v[i][0] * w.x, b = v[i][1] * w.y, c = v[i][2] * u.x, d = v[i][3] * u.y;
#pragma unroll
      for (int j = 0; j < 4; j++) squares = fmaf(v[i][j], v[i][j], squares);
      working.x[first(i, at) / 4 + at.lane % 8] =
          make_uint4(pack(a, b), pack(c, d), pack_rest(a, b), pack_rest(c, d));
    }
    squares = sum_of(squares, 32);
    if (at.lane == 0) working.squares[at.warp] = squares;
    __syncwarp();
  }
};

// Add up what the teams computed for this block's own channels, and publish it. One warp calls it.
__device__ __forceinline__ void add_up(const Exchange &exchange, int turn, const Place &at,
                                       uint32_t limit) {
  constexpr int LANES = 32 / TEAMS, FOURS = OWN / 4, ROUNDS = (FOURS + LANES - 1) / LANES;
  const int team = at.lane / LANES, own = at.member * SLICE + at.team * OWN;
  const uint32_t *sums = exchange.now + SUMS_AT + (turn * TEAMS + team) * HIDDEN + own;
  auto four = [&](int i) { return i * LANES + at.lane % LANES; };
  uint4 words[ROUNDS];
  collect(words, [&](int i) { return sums + least(four(i), FOURS - 1) * 4; }, limit);
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const uint4 w = words[i];
    float sum[4] = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                    __uint_as_float(w.w)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      for (int offset = LANES; offset < 32; offset *= 2) {
        sum[j] += __shfl_xor_sync(~0u, sum[j], offset);
      }
    }
    if (team < 4 && four(i) < FOURS) {  // a word a lane
      const float mine = team < 2 ? (team ? sum[1] : sum[0]) : (team == 2 ? sum[2] : sum[3]);
      exchange.put(TOTALS_AT + turn * HIDDEN + own + four(i) * 4 + team, mine);
    }
  }
}

__device__ __forceinline__ float norm_scale(const Working &working, float eps) {
  return rsqrtf(total(working.squares) * (1.f / HIDDEN) + eps);
}

// The warp that streams: the same products in the same order as `follow` computes them.
__device__ void stream(const Step &p, Ring ring, const Place &at) {
  const uint64_t policy = read_once_policy();
  const int team = at.team, member = at.member;
  for (int l = 0; l < p.num_layers; l++) {
    const Layer &layer = p.layers[l];
    const int kv = HEADS * HEAD_DIM + team * HEAD_DIM + member * KV_ROWS - Q_ROWS;
    const int q = team * TEAM_Q + member * Q_ROWS, act = team * ACTS + member * ACT_ROWS;
    const Rows qkv = {layer.qkv, HIDDEN, q, Q_ROWS, kv - q, Q_ROWS + KV_ROWS,
                      KV_HEADS * HEAD_DIM - KV_ROWS};
    const Rows out = {layer.out + team * TEAM_Q, HEADS * HEAD_DIM, member * SLICE, SLICE, 0, SLICE, 0};
    const Rows gate_up = {layer.gate_up, HIDDEN, act, ACT_ROWS, INTERMEDIATE - ACT_ROWS,
                          2 * ACT_ROWS, 0};
    const Rows down = {layer.down + team * ACTS, INTERMEDIATE, member * SLICE, SLICE, 0, SLICE, 0};
    fill<Qkv>(ring, qkv, Qkv::ROWS, policy);
    fill<Out>(ring, out, Out::ROWS, policy);
    fill<GateUp>(ring, gate_up, GateUp::ROWS, policy);
    fill<Down>(ring, down, Down::ROWS, policy);
  }
  for (int row = blockIdx.x * X_ROWS; row < p.vocab; row += BLOCKS * X_ROWS) {
    const Rows head = {p.head, HIDDEN, row, X_ROWS, 0, X_ROWS, 0};
    fill<Head>(ring, head, least(X_ROWS, p.vocab - row), policy);
  }
}

// The warps that compute.
__device__ void follow(const Step &p, Ring ring, Working &working, const Place &at) {
  const int warp = at.warp, lane = at.lane, thread = warp * 32 + lane;
  const uint32_t limit = p.spin_limit;
  Residual residual;
  uint2 norm[Residual::MINE];
  const Attention attention(*p.length, static_cast<int>(*p.place), p.eps, at);
  attention.place(p.table, p.block_size, working, at);
  if (thread < HEAD_DIM / 2) {
    float sine, cosine;
    sincosf(static_cast<float>(*p.position) * p.frequencies[thread], &sine, &cosine);
    working.rotation[thread] = cosine * p.rotation_scale;
    working.rotation[HEAD_DIM / 2 + thread] = sine * p.rotation_scale;
  }
  const size_t words = static_cast<size_t>(p.num_layers) * LAYER_WORDS;
  const uint32_t odd = *static_cast<volatile uint32_t *>(p.epoch) & 1;
  Exchange exchange = {p.exchange + odd * words, p.exchange + (1 - odd) * words};

  auto channels = [&](int part, int i) {  // of x
    const int four = (part * X_WIDTH + warp * (X_WIDTH / WARPS)) / 4 + i * 4 + lane % 4;
    return reinterpret_cast<const uint2 *>(&working.x[four])[lane / 4 % 2];
  };
  float *const sums0 = working.sums[0], *const sums1 = working.sums[1];
  residual.begin(p.embedding + *p.token * HIDDEN, at);
  Residual::read(norm, p.layers[0].input_norm, at);
  // Attention and MLP in turn. They have code in common, and instructions too have to be fetched.
#pragma unroll 1
  for (int half = 0; half < 2 * p.num_layers; half++) {
    const int l = half / 2, turn = half % 2;
    const Layer &layer = p.layers[l];
    residual.normalise(norm, working, at);
    multiply<Head>(ring, channels, sums0 + warp, turn ? GateUp::ROWS : Qkv::ROWS, warp, lane);
    sync_threads(WORKERS);
    const float scale = norm_scale(working, p.eps);
    const bf16 *next_norm = layer.mlp_norm;
    if (turn == 0) {
      // q, k and v of the team's heads, and their part of the output projection.
      if (thread < Qkv::ROWS) {
        int to = at.member * Q_ROWS + thread;
        if (thread >= Q_ROWS) to = TEAM_Q + at.member * KV_ROWS + thread - Q_ROWS;
        if (thread >= Q_ROWS + KV_ROWS) to += HEAD_DIM - KV_ROWS;
        exchange.put(QKV_AT + at.team * TEAM_QKV + to, total(sums0 + thread * SUMS_PITCH) * scale);
      }
      attend(attention, layer, exchange, working, at, limit);
      if (l + 1 < p.num_layers && thread >= TEAM_Q / 2) {  // those who had nothing to publish
        attention.prefetch(p.layers[l + 1], working, thread - TEAM_Q / 2, WORKERS - TEAM_Q / 2);
      }
      uint2 heads[Out::MOST_STEPS];
#pragma unroll
      for (int i = 0; i < Out::MOST_STEPS; i++) {
        const int step = Out::begin(warp) + i;
        if (step < Out::end(warp)) heads[i] = attended(exchange, step, at, limit);
      }
      auto parts = [&](int, int i) { return heads[i]; };
      multiply<Out>(ring, parts, sums1 + warp, Out::ROWS, warp, lane);
    } else {
      // The team's columns of the MLP.
      if (thread < ACT_ROWS) {
        const float gate = total(sums0 + thread * SUMS_PITCH) * scale;
        const float up = total(sums0 + (thread + ACT_ROWS) * SUMS_PITCH) * scale;
        const int act = lane_order(at.member * ACT_ROWS + thread);
        exchange.put(ACTS_AT + at.team * ACTS + act, __fdividef(gate, 1.f + __expf(-gate)) * up);
      }
      uint4 acts[Down::PARTS * Down::MOST_STEPS];
      collect(
          acts,
          [&](int i) {
            const int step = least(Down::begin(warp) + i % Down::MOST_STEPS, Down::STEPS - 1);
            const int channel = i / Down::MOST_STEPS * Down::WIDTH + step * 16 + lane % 4 * 4;
            return exchange.now + ACTS_AT + at.team * ACTS + channel;
          },
          limit);
      auto activations = [&](int part, int i) {
        const uint4 words = acts[part * Down::MOST_STEPS + i];
        const float a = __uint_as_float(words.x), b = __uint_as_float(words.y);
        const float c = __uint_as_float(words.z), d = __uint_as_float(words.w);
        return lane / 4 % 2 ? make_uint2(pack_rest(a, b), pack_rest(c, d))
                            : make_uint2(pack(a, b), pack(c, d));
      };
      multiply<Down>(ring, activations, sums1 + warp, Down::ROWS, warp, lane);
      next_norm = l + 1 < p.num_layers ? p.layers[l + 1].input_norm : p.norm;
    }
    Residual::read(norm, next_norm, at);

    // Its sums are channels of this member's slice of the residual stream.
    sync_threads(WORKERS);
    if (thread < SLICE) {
      const int channel = lane_order(at.member * SLICE + thread);
      exchange.put(SUMS_AT + (turn * TEAMS + at.team) * HIDDEN + channel,
                   total(sums1 + thread * SUMS_PITCH));
    }
    if (warp == WARPS - 1) add_up(exchange, turn, at, limit);
    residual.gather(exchange, turn, at, limit);
    if (turn) exchange.now += LAYER_WORDS, exchange.next += LAYER_WORDS;
  }

  residual.normalise(norm, working, at);
  int tile = 0;
  for (int row = blockIdx.x * X_ROWS; row < p.vocab; row += BLOCKS * X_ROWS, tile++) {
    float *sums = sums0 + tile % 2 * X_ROWS * SUMS_PITCH;  // the tile before may still be added up
    multiply<Head>(ring, channels, sums + warp, X_ROWS, warp, lane);
    sync_threads(WORKERS);
    if (warp == tile % WARPS) {
      const float scale = norm_scale(working, p.eps);
      for (int i = lane; i < least(X_ROWS, p.vocab - row); i += 32) {
        p.logits[row + i] = total(sums + i * SUMS_PITCH) * scale;
      }
    }
  }
}

__global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Step p) {
  extern __shared__ unsigned char memory[];
  Shared &shared = *reinterpret_cast<Shared *>(
      memory + (128 - shared_address(memory) % 128) % 128);
  const Place at = {static_cast<int>(threadIdx.x / 32), static_cast<int>(threadIdx.x % 32),
                    static_cast<int>(blockIdx.x / MEMBERS), static_cast<int>(blockIdx.x % MEMBERS)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(shared_address(&shared.full[i]), 1);
      barrier_init(shared_address(&shared.empty[i]), WARPS);
    }
    barriers_visible();
  }
  __syncthreads();
  const Ring ring(shared, p.spin_limit);
  if (at.warp == WARPS) {
    stream(p, ring, at);
  } else {
    follow(p, ring, shared.working, at);
  }
  // All blocks have read it: what they published since was needed to come here.
  if (blockIdx.x == 0 && threadIdx.x == 0) publish(p.epoch, *p.epoch + 1);
}

cudaLaunchConfig_t launch_config(cudaLaunchAttribute &attribute, cudaStream_t stream) {
  attribute.id = cudaLaunchAttributeCooperative;  // all blocks at once, or an error
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(BLOCKS), config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(Shared) + 128;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

}  // namespace kvist

extern "C" {

// Of these declarations; kvist.kernels.cuda refuses a library of another.
int32_t kvist_one_launch_interface() { return 1; }

// Bytes of a Step and of a Layer, for the caller to compare with its own.
int32_t kvist_one_launch_step_bytes() { return sizeof(kvist::Step); }
int32_t kvist_one_launch_layer_bytes() { return sizeof(kvist::Layer); }

// Words of `exchange` for each layer.
int32_t kvist_one_launch_layer_words() { return 2 * kvist::LAYER_WORDS; }

// Prepare the kernel on the current device: 0 if that holds all blocks at once, else an error of
// CUDA's.
int32_t kvist_one_launch_prepare() {
  using namespace kvist;
  auto *kernel = reinterpret_cast<const void *>(decode_step);
  const int bytes = sizeof(Shared) + 128;
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS, bytes);
  }
  if (error == cudaSuccess && resident * multiprocessors < BLOCKS) {
    error = cudaErrorCooperativeLaunchTooLarge;
  }
  cudaGetLastError();
  return error;
}

// Start a step on a stream; 0, or an error of CUDA's.
int32_t kvist_one_launch(const kvist::Step *step, void *stream) {
  using namespace kvist;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(attribute, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaLaunchKernelEx(&config, decode_step, *step);
  cudaGetLastError();
  return error;
}

const char *kvist_one_launch_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
