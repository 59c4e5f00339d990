// Lists the splits of a step for decode.cu, whose programs take turns on them.

#include "items.cuh"

__device__ __forceinline__ int split_length(int count) {
    int length = count > TARGET * MIN_SPLIT / 4 ? 2 * MIN_SPLIT : MIN_SPLIT;
    for (int i = 1; i < DOUBLINGS; i++)
        if (count > TARGET * (MIN_SPLIT << i)) length = MIN_SPLIT << (i + 1);
    return length;
}

// One program of 1,024 threads lists the splits of all sequences, those that are cut short last.
extern "C" __global__ void __launch_bounds__(1024)
list_kernel(const int *lens, const int *starts, Item *items, int *num_items, int *ended, int sequences, int kv_heads,
            int ragged) {
    __shared__ int sums[2][LANES];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    auto splits_of = [&](int b, int &row) {
        row = b;
        if (b >= sequences) return 0;
        if (ragged) {
            row = starts[b];
            if (starts[b + 1] - row != 1) return 0;
        }
        const int n = lens[b];
        return n > 0 ? (n + split_length(n) - 1) / split_length(n) : 0;
    };
    // Sums of this thread's two numbers and those of all threads before it.
    auto scan = [&](int &whole, int &cut) {
        for (int step = 1; step < LANES; step *= 2) {
            const int x = __shfl_up_sync(~0u, whole, step), y = __shfl_up_sync(~0u, cut, step);
            if (lane >= step) whole += x, cut += y;
        }
        __syncthreads();
        if (lane == LANES - 1) sums[0][warp] = whole, sums[1][warp] = cut;
        __syncthreads();
        for (int w = 0; w < warp; w++) whole += sums[0][w], cut += sums[1][w];
    };
    for (int i = threadIdx.x; i < sequences * kv_heads; i += 1024) ended[i] = 0;
    int whole_done = 0, cut_done = 0;
    for (int pass = 0; pass < 2; pass++) {
        int first_whole = 0, first_cut = whole_done;
        for (int base = 0; base < sequences; base += 1024) {
            const int b = base + threadIdx.x;
            int row;
            const int splits = splits_of(b, row);
            int whole = max(splits - 1, 0), cut = splits > 0;
            scan(whole, cut);
            if (pass && splits) {
                const int n = lens[b], length = split_length(n);
                for (int s = 0; s < splits; s++) {
                    const int at = s < splits - 1 ? first_whole + whole - (splits - 1) + s : first_cut + cut - 1;
                    items[at] = {b, row, s * length, min(length, n - s * length) | s << 11 | splits << 21};
                }
            }
            __syncthreads();
            for (int w = 0; w < LANES; w++) first_whole += sums[0][w], first_cut += sums[1][w];
        }
        whole_done = first_whole, cut_done = first_cut;
    }
    if (threadIdx.x == 0) *num_items = cut_done;
}
