// Paged decode attention. A program takes splits of contexts for eight heads of keys, one warp a head;
// one more warp has the copy engine bring 16 tokens at a time, all heads of them, which lie in memory
// one behind the other, into a ring in shared memory. From there bytes go to the registers that the
// tensor cores read, and nothing is exchanged on the way. Compiled for one layout by compiled.py, which
// says what the constants are.
//
// Scores are computed transposed, keys by queries: keys are the rows of the first operand, so that a
// lane needs four channels of a key at a time, and which ones is free as long as the queries agree. A
// lane takes 16 bytes of a key, and these are its operands. So it is with values, whose channels are
// rows and whose keys are summed over: a lane takes the same channels of two keys and pairs their
// bytes. In m16n8k16, lane 4 g + t has rows g and g + 8, and of what is summed over, numbers
// 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; of a result, columns 2 t and 2 t + 1.
//
// Column n stands for query n mod GROUP. INT4 has a scale for each 32 channels: there a column is a
// query in one such group, the operand is zero where a channel is of another group, and scales are
// applied to sums. A lane always has the same queries in its columns, in scores and in outputs.

#include "ptx.cuh"

constexpr int KEYS = 16, DIM = 128, WARPS = KV_HEADS < 8 ? KV_HEADS : 8;
constexpr int HEADS = KV_HEADS * GROUP;
__device__ constexpr int row_bytes(int kind) { return kind == INT4 ? 64 : 128; }
// Of each of a tile's scales, and so of its zeros.
__device__ constexpr int scale_bytes(int kind) { return KEYS * KV_HEADS * (kind == INT4 ? 8 : 2); }
constexpr int K_ROW = row_bytes(K_KIND), V_ROW = row_bytes(V_KIND);
// Each four tokens are 64 bytes further apart than in memory, and rows stand for keys in the order of
// `key_of`: so lanes that read together read from different banks. More pieces would take the copy
// engine longer than conflicts do.
constexpr int FOUR = 4, PAD = 64, K_TOKEN = WARPS * K_ROW, V_TOKEN = WARPS * V_ROW;
constexpr int K_FOUR = FOUR * K_TOKEN + PAD, V_FOUR = FOUR * V_TOKEN + PAD;
constexpr int K_SCALES = scale_bytes(K_KIND), V_SCALES = scale_bytes(V_KIND);
constexpr int V_AT = KEYS / FOUR * K_FOUR, K_SCALES_AT = V_AT + KEYS / FOUR * V_FOUR;
constexpr int V_SCALES_AT = K_SCALES_AT + K_SCALES * (K_KIND == INT4 ? 2 : 1);
constexpr int STAGE = V_SCALES_AT + V_SCALES * (V_KIND == INT4 ? 2 : 1);
constexpr int ARRIVING = KEYS * WARPS * (K_ROW + V_ROW) + STAGE - K_SCALES_AT;  // bytes of a tile
// Results of 8 columns: INT4 needs its four groups times the queries.
__device__ constexpr int columns(int kind) { return kind == INT4 && GROUP > 2 ? 2 : 1; }
constexpr int K_TILES = columns(K_KIND), V_TILES = columns(V_KIND);
constexpr float LOWEST = -1e30f;
// The maximum that numbers are scaled by follows the largest score when that is so far ahead.
constexpr float AHEAD = 6.0f;

// The key of a tile that row `row` stands for; 8 more for rows from 8 on.
__device__ __forceinline__ int key_of(int row) { return row / 2 + FOUR * ((row ^ row / 4) & 1); }

struct Side {
    const char *x, *scale, *zero;
};

// A tile's 16 tokens, from `token` on, which are neighbours in memory.
__device__ __forceinline__ void fetch(u32 slot, u32 barrier, const Side &keys, const Side &values, long long token, int lane) {
    if (lane == 0) barrier_expect(barrier, ARRIVING);
    __syncwarp();
    const int part = lane % (KEYS / FOUR);
    const long long first = token + part * FOUR;
    if (lane < 2 * (KEYS / FOUR)) {
        const bool value = lane >= KEYS / FOUR;
        const char *from = value ? values.x + (first * KV_HEADS + blockIdx.y * WARPS) * V_ROW
                                 : keys.x + (first * KV_HEADS + blockIdx.y * WARPS) * K_ROW;
        const u32 to = slot + (value ? V_AT + part * V_FOUR : part * K_FOUR);
        if constexpr (WARPS == KV_HEADS) bring(to, from, value ? FOUR * V_TOKEN : FOUR * K_TOKEN, barrier);
        else
            for (int i = 0; i < FOUR; i++)
                bring(to + i * (value ? V_TOKEN : K_TOKEN), from + i * KV_HEADS * (value ? V_ROW : K_ROW),
                      value ? V_TOKEN : K_TOKEN, barrier);
    } else {
        // Scales of keys, of values, zeros of keys, of values; of all heads.
        const int which = lane - 2 * (KEYS / FOUR);
        constexpr int K_SIZE = K_SCALES / KEYS, V_SIZE = V_SCALES / KEYS;
        if (which == 0) bring(slot + K_SCALES_AT, keys.scale + token * K_SIZE, K_SCALES, barrier);
        if (which == 1) bring(slot + V_SCALES_AT, values.scale + token * V_SIZE, V_SCALES, barrier);
        if (K_KIND == INT4 && which == 2) bring(slot + K_SCALES_AT + K_SCALES, keys.zero + token * K_SIZE, K_SCALES, barrier);
        if (V_KIND == INT4 && which == 3) bring(slot + V_SCALES_AT + V_SCALES, values.zero + token * V_SIZE, V_SCALES, barrier);
    }
}

// The scale of a tile's key, h of all heads; `zero` gives INT4's zeros instead.
template <int KIND> __device__ __forceinline__ float scale_at(const char *scales, int key, int h, int group, bool zero = false) {
    const u16 *x = (const u16 *)(scales + (zero ? scale_bytes(KIND) : 0));
    return of_half(KIND == INT4 ? x[(key * KV_HEADS + h) * 4 + group] : x[key * KV_HEADS + h]);
}

// The group of channels that columns 2 t and 2 t + 1 of result `tile` stand for.
__device__ __forceinline__ int group_of(int tile, int t) { return GROUP > 2 ? 2 * tile + t / 2 : t; }

// The query in the operand of the scores: two numbers for each of 8 products.
__device__ __forceinline__ void load_query(u32 (&q)[8][2], const u16 *from, int lane) {
    const int g = lane / 4, t = lane % 4;
    from += (g % GROUP) * DIM;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if constexpr (K_KIND == INT4) {
            const int nibble = j / 4, d = 64 * nibble + 16 * t + 4 * (j % 4);
            const int group = GROUP > 2 ? 2 * nibble + g / 4 : g / 2;
            const float factor = group != 2 * nibble + t / 2 ? 0.0f : nibble ? 0.0625f : 1.0f;
            q[j][0] = pack(of_model(from[d]) * factor, of_model(from[d + 2]) * factor);
            q[j][1] = pack(of_model(from[d + 1]) * factor, of_model(from[d + 3]) * factor);
        } else {
            const int d = 64 * (j / 4) + 16 * t + 4 * (j % 4);
            q[j][0] = pack(of_model(from[d]), of_model(from[d + 1]));
            q[j][1] = pack(of_model(from[d + 2]), of_model(from[d + 3]));
        }
    }
}

// Scores of a tile of keys, without the model's factor: s[0], s[1] of row g, s[2], s[3] of row g + 8.
__device__ __forceinline__ void score(float (&s)[4], const u32 (&q)[8][2], const float (&sums)[K_TILES][2],
                                      const char *stage, int warp, int h, int lane) {
    const int t = lane % 4, near = key_of(lane / 4), far = near + 8;
    const char *at = stage + near * K_TOKEN + near / FOUR * PAD + warp * K_ROW + 16 * t, *scales = stage + K_SCALES_AT;
    float c[K_TILES][4] = {};
#pragma unroll
    for (int i = 0; i < K_ROW / 64; i++) {
        const uint4 first = *(const uint4 *)(at + 64 * i), second = *(const uint4 *)(at + 2 * K_FOUR + 64 * i);
        const u32 a[4] = {first.x, first.y, first.z, first.w}, b[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            if constexpr (K_KIND == INT4) {
                const u32 a8 = a[w] >> 8, b8 = b[w] >> 8;
                product(c[0], low_nibbles(a[w]), low_nibbles(b[w]), low_nibbles(a8), low_nibbles(b8), q[w][0], q[w][1]);
                product(c[K_TILES - 1], high_nibbles(a[w]), high_nibbles(b[w]), high_nibbles(a8), high_nibbles(b8),
                        q[4 + w][0], q[4 + w][1]);
            } else {
                u32 a0, a1, a2, a3;
                halves<K_KIND>(a[w], a0, a2);
                halves<K_KIND>(b[w], a1, a3);
                product(c[0], a0, a1, a2, a3, q[4 * i + w][0], q[4 * i + w][1]);
            }
        }
    }
    if constexpr (K_KIND == INT4) {
        // Nibbles were 1024 too large, and those of high ones 16 times, as their queries are a 16th.
#pragma unroll
        for (int n = 0; n < K_TILES; n++) {
            const int group = group_of(n, t);
            const float whole = group < 2 ? 1.0f : 16.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = i < 2 ? near : far;
                const float sum = sums[n][i & 1];
                c[n][i] = (c[n][i] - 1024.0f * sum) * scale_at<K_KIND>(scales, key, h, group) +
                          whole * sum * scale_at<K_KIND>(scales, key, h, group, true);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = K_TILES > 1 ? c[0][i] + c[K_TILES - 1][i] : c[0][i];
            if constexpr (GROUP <= 2) s[i] += __shfl_xor_sync(~0u, s[i], 1);
            s[i] += __shfl_xor_sync(~0u, s[i], 2);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = c[0][i];
        const float first = scale_at<K_KIND>(scales, near, h, 0), second = scale_at<K_KIND>(scales, far, h, 0);
        s[0] *= first, s[1] *= first, s[2] *= second, s[3] *= second;
    }
}

// Add a tile's values, weighted by p, to the outputs; `zeros` is what INT4's still lack. Keys from `left`
// on are not there: whatever their bytes are counts for nothing.
__device__ __forceinline__ void mix(float (&o)[8][4], float (&zeros)[V_TILES][2], const float (&p)[4], const char *stage,
                                    int warp, int h, int lane, int left) {
    const int g = lane / 4, t = lane % 4, near = key_of(g), far = near + 8;
    const char *scales = stage + V_SCALES_AT;
    u32 weights[V_TILES][2];
#pragma unroll
    for (int n = 0; n < V_TILES; n++) {
        float first = near < left ? scale_at<V_KIND>(scales, near, h, group_of(n, t)) : 0.0f;
        float second = far < left ? scale_at<V_KIND>(scales, far, h, group_of(n, t)) : 0.0f;
        const u32 one = pack(p[0] * first, p[1] * first), two = pack(p[2] * second, p[3] * second);
        weights[n][0] = transposed(one), weights[n][1] = transposed(two);
        if constexpr (V_KIND == INT4) {
            first = near < left ? scale_at<V_KIND>(scales, near, h, group_of(n, t), true) : 0.0f;
            second = far < left ? scale_at<V_KIND>(scales, far, h, group_of(n, t), true) : 0.0f;
            // Nibbles are 1024 too large below, and high ones 16 times.
            const float more = group_of(n, t) < 2 ? 1024.0f : 64.0f;
            zeros[n][0] += p[0] * first + p[2] * second - more * (of_half(one) + of_half(two));
            zeros[n][1] += p[1] * first + p[3] * second - more * (of_half(one >> 16) + of_half(two >> 16));
        }
    }
    // Rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    const int key[4] = {key_of(2 * t), key_of(2 * t + 1), key_of(2 * t) + 8, key_of(2 * t + 1) + 8};
    const int one = key[0] * V_TOKEN + key[0] / FOUR * PAD, two = key[1] * V_TOKEN + key[1] / FOUR * PAD;
    const int offset[4] = {one, two, one + 2 * V_FOUR, two + 2 * V_FOUR};
    const char *at = stage + V_AT + warp * V_ROW + (V_KIND == INT4 ? 8 : 16) * g;
    if constexpr (V_KIND == INT4) {
        uint2 v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = *(const uint2 *)(at + offset[e]);
#pragma unroll
        for (int w = 0; w < 2; w++) {
            const u32 a = w ? v[0].y : v[0].x, b = w ? v[1].y : v[1].x, c = w ? v[2].y : v[2].x, d = w ? v[3].y : v[3].x;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 near = __byte_perm(a, b, i ? 0x7632 : 0x5410), far = __byte_perm(c, d, i ? 0x7632 : 0x5410);
                const u32 near8 = near >> 8, far8 = far >> 8;
                product(o[2 * w + i], low_nibbles(near), low_nibbles(near8), low_nibbles(far), low_nibbles(far8),
                        weights[0][0], weights[0][1]);
                product(o[4 + 2 * w + i], high_nibbles(near), high_nibbles(near8), high_nibbles(far), high_nibbles(far8),
                        weights[V_TILES - 1][0], weights[V_TILES - 1][1]);
            }
        }
    } else {
        u32 v[4][4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint4 y = *(const uint4 *)(at + offset[e]);
            v[e][0] = y.x, v[e][1] = y.y, v[e][2] = y.z, v[e][3] = y.w;
        }
        if (left < KEYS)  // bytes may be no numbers, which nothing times 0 is
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int w = 0; w < 4; w++) v[e][w] = key[e] < left ? v[e][w] : 0;
#pragma unroll
        for (int w = 0; w < 4; w++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 a0, a1, a2, a3;
                halves<V_KIND>(__byte_perm(v[0][w], v[1][w], k ? 0x7362 : 0x5140), a0, a1);
                halves<V_KIND>(__byte_perm(v[2][w], v[3][w], k ? 0x7362 : 0x5140), a2, a3);
                product(o[2 * w + k], a0, a1, a2, a3, weights[0][0], weights[0][1]);
            }
    }
}

// Write what a split came to, unnormalised, with its maximum and sum.
__device__ __forceinline__ void leave(float *partial, float *stats, const float (&o)[8][4], const float (&zeros)[V_TILES][2],
                                      const float (&top)[2], const float (&total)[2], int h, const Item &item,
                                      int max_splits, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int query = V_KIND == INT4 ? (GROUP > 1 ? (2 * t + i) % GROUP : i) : 2 * t + i;
        if (query >= GROUP) continue;
        const long long slot = ((long long)item.b * HEADS + h * GROUP + query) * max_splits + item.split();
        float *to = partial + slot * DIM;
        if (g == 0 && 2 * t + i < GROUP) stats[2 * slot] = top[i], stats[2 * slot + 1] = total[i];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int tile = V_TILES > 1 ? half : 0;
            if (V_KIND == INT4 && group_of(tile, t) != 2 * half + g / 4) continue;
            const float more = V_KIND == INT4 ? zeros[tile][i] : 0.0f, part = V_KIND == INT4 && half ? 0.0625f : 1.0f;
            // Channels of products 4 half to 4 half + 3 are next to each other.
            const int d = V_KIND == INT4 ? 64 * half + 8 * g : 16 * g + 8 * half;
#pragma unroll
            for (int m = 0; m < 4; m += 2)
                *(float4 *)(to + d + 2 * m) = make_float4(
                    part * o[4 * half + m][i] + more, part * o[4 * half + m][2 + i] + more,
                    part * o[4 * half + m + 1][i] + more, part * o[4 * half + m + 1][2 + i] + more);
        }
    }
}

// One query's output from its splits, brought back from the basis of the values.
__device__ __forceinline__ void combine(u16 *out, const float *partial, const float *stats, int splits, int lane) {
    float top = LOWEST, total = 0.0f;
    for (int s = lane; s < splits; s += LANES) top = fmaxf(top, __ldcg(stats + 2 * s));
    for (int step = 1; step < LANES; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    float x[4] = {};
    for (int first = 0; first < splits; first += LANES) {
        float weight = 0.0f;
        if (first + lane < splits) {
            weight = power(__ldcg(stats + 2 * (first + lane)) - top);
            total += weight * __ldcg(stats + 2 * (first + lane) + 1);
        }
        const int here = min(splits - first, LANES);
        for (int s = 0; s < here; s += FOUR) {
            float4 y[FOUR];
#pragma unroll
            for (int i = 0; i < FOUR; i++)  // behind the last split comes the last again, weightless
                y[i] = __ldcg((const float4 *)(partial + (first + min(s + i, here - 1)) * DIM) + lane);
#pragma unroll
            for (int i = 0; i < FOUR; i++) {
                const float w = __shfl_sync(~0u, weight, s + i);
                if (s + i < here) x[0] += w * y[i].x, x[1] += w * y[i].y, x[2] += w * y[i].z, x[3] += w * y[i].w;
            }
        }
    }
    for (int step = 1; step < LANES; step *= 2) total += __shfl_xor_sync(~0u, total, step);
    float factor = 1.0f / total;
#if ROTATE
    factor *= 0.0625f;
    const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float other = __shfl_xor_sync(~0u, x[i], step);
            x[i] = lane & step ? other - x[i] : x[i] + other;
        }
#endif
    const u32 low = to_model(x[0] * factor) | (u32)to_model(x[1] * factor) << 16;
    const u32 high = to_model(x[2] * factor) | (u32)to_model(x[3] * factor) << 16;
    *((uint2 *)out + lane) = make_uint2(low, high);
}

// Programs take turns on the items; the last warp to end with a head of a sequence puts its splits
// together.
extern "C" __global__ void __launch_bounds__((WARPS + 1) * LANES, PER_SM)
decode_kernel(const u16 *q, const char *k, const char *k_scale, const char *k_zero, const char *v, const char *v_scale,
              const char *v_zero, const int *table, const Item *items, const int *num_items, float *partial, float *stats,
              int *ended, u16 *out, int table_stride, int max_splits, float scale) {
    extern __shared__ __align__(128) char ring[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WARPS * LANES);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int total_items = *num_items;
    int stage = 0;
    u32 phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };
    if (warp == WARPS) {
        const Side keys = {k, k_scale, k_zero}, values = {v, v_scale, v_zero};
        // The next item and its blocks, one or two a lane, are asked for while this one is fetched.
        Item item = {}, next = {};
        int low = 0, high = 0, next_low = 0, next_high = 0;
        auto ask_for_blocks = [&](const Item &of) {
            const int first = of.begin / BLOCK, blocks = (of.begin + of.count() - 1) / BLOCK - first + 1;
            const int *row = table + (long long)of.b * table_stride + first;
            next_low = lane < blocks ? row[lane] : 0;
            next_high = LANES + lane < blocks ? row[LANES + lane] : 0;
        };
        int index = blockIdx.x;
        if (index < total_items) next = items[index], ask_for_blocks(next);
        for (; index < total_items; index += gridDim.x) {
            item = next, low = next_low, high = next_high;
            const bool more = index + gridDim.x < total_items;
            if (more) next = items[index + gridDim.x];
            const int end = item.begin + item.count(), first_block = item.begin / BLOCK;
            for (int key = item.begin; key < end; key += KEYS) {
                const int at = key / BLOCK - first_block;
                const int block = __shfl_sync(~0u, at < LANES ? low : high, at % LANES);
                barrier_wait(empty + 8 * stage, phase ^ 1);
                fetch(shared_address(ring) + stage * STAGE, full + 8 * stage, keys, values,
                      (long long)block * BLOCK + key % BLOCK, lane);
                advance();
                if (more && key == item.begin) ask_for_blocks(next);
            }
        }
        return;
    }
    const int h = blockIdx.y * WARPS + warp, near = key_of(lane / 4);
    Item item, next = {};
    if (blockIdx.x < total_items) next = items[blockIdx.x];
    for (int index = blockIdx.x; index < total_items; index += gridDim.x) {
        item = next;
        if (index + gridDim.x < total_items) next = items[index + gridDim.x];
        u32 query[8][2];
        load_query(query, q + ((long long)item.row * HEADS + h * GROUP) * DIM, lane);
        float sums[K_TILES][2] = {};
        if constexpr (K_KIND == INT4) {
            const u32 one = 0x3C003C00u;
            float c[K_TILES][4] = {};
#pragma unroll
            for (int j = 0; j < 8; j++) product(c[j < 4 ? 0 : K_TILES - 1], one, one, one, one, query[j][0], query[j][1]);
#pragma unroll
            for (int n = 0; n < K_TILES; n++) sums[n][0] = c[n][0], sums[n][1] = c[n][1];
        }
        float o[8][4] = {}, zeros[V_TILES][2] = {}, top[2] = {LOWEST, LOWEST}, total[2] = {};
        for (int left = item.count(); left > 0; left -= KEYS) {
            const char *slot = ring + stage * STAGE;
            barrier_wait(full + 8 * stage, phase);
            float s[4];
            score(s, query, sums, slot, warp, h, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) s[i] = near + 4 * (i & 2) < left ? s[i] * scale : LOWEST;
            const float most[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
            if (__any_sync(~0u, most[0] > top[0] + AHEAD || most[1] > top[1] + AHEAD)) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float higher = fmaxf(top[i], across_keys_max(most[i])), fade = power(top[i] - higher);
                    top[i] = higher;
                    total[i] *= fade;
#pragma unroll
                    for (int n = 0; n < V_TILES; n++) zeros[n][i] *= fade;
#pragma unroll
                    for (int m = 0; m < 8; m++) o[m][i] *= fade, o[m][2 + i] *= fade;
                }
            }
            float p[4];
#pragma unroll
            for (int i = 0; i < 4; i++) p[i] = power(s[i] - top[i & 1]);
            total[0] += p[0] + p[2];
            total[1] += p[1] + p[3];
            mix(o, zeros, p, slot, warp, h, lane, left);
            __syncwarp();
            barrier_arrive(empty + 8 * stage);
            advance();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[i] = across_keys_sum(total[i]);
            if constexpr (V_KIND == INT4)
#pragma unroll
                for (int n = 0; n < V_TILES; n++) zeros[n][i] = across_keys_sum(zeros[n][i]);
        }
        leave(partial, stats, o, zeros, top, total, h, item, max_splits, lane);
        if (item.splits() > 1) {
            __threadfence();
            __syncwarp();
            int before = 0;
            if (lane == 0) before = atomicAdd(ended + item.b * KV_HEADS + h, 1);
            if (__shfl_sync(~0u, before, 0) != item.splits() - 1) continue;
            __threadfence();
            if (lane == 0) ended[item.b * KV_HEADS + h] = 0;
        }
        __syncwarp();
        for (int i = 0; i < GROUP; i++) {
            const long long slot = ((long long)item.b * HEADS + h * GROUP + i) * max_splits;
            combine(out + ((long long)item.row * HEADS + h * GROUP + i) * DIM, partial + slot * DIM, stats + 2 * slot,
                    item.splits(), lane);
        }
    }
}
