// What the tests call that a step does not: one matrix, and the threads, by themselves.
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "step.h"

using namespace kvist;

// out [rows, ceil(matrix_rows / 16) * 16] = x [rows, columns] times a stored matrix. 0, or 1 where
// this processor has not what the instruction set needs.
extern "C" __attribute__((visibility("default"))) int32_t kvist_test_linear(
    const char* isa, int32_t stored, const uint8_t* matrix_rows, int32_t count, int32_t columns,
    int32_t rows, const float* x, float* out) {
    const Kernels* kernels = kernels_named(isa);
    if (!kernels) return 1;
    const Kind kind = kind_of((Stored)stored);
    if (in_floats(kind) && kernels->for_floats) kernels = kernels->for_floats;
    Matrix matrix{nullptr, (int64_t)columns / BLOCK * block_bytes(kind), (count + 15) / 16, columns,
                  kind};
    Arena packed(matrix.groups * matrix.stride);
    matrix.data = packed.take(matrix.groups * matrix.stride);
    Pool pool(1, {});
    pack(pool, kernels->tiles, matrix, (Stored)stored, matrix_rows, count);
    const int64_t room = ((int64_t)rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    const int64_t blocks = room * (columns / BLOCK);
    std::vector<int8_t> q(room * columns);
    std::vector<float> scale(blocks), sum(blocks);
    std::vector<int32_t> isum(blocks);
    std::vector<float> floats(in_floats(kind) ? rows * columns : 0);
    Arena arena(scratch_bytes(columns, rows) + room * columns * 2);
    void* scratch = arena.take(scratch_bytes(columns, rows));
    const Activations to{q.data(),
                         scale.data(),
                         sum.data(),
                         isum.data(),
                         floats.empty() ? nullptr : floats.data(),
                         (uint16_t*)arena.take(room * columns * 2),
                         columns,
                         rows == 1};
    for (int r = 0; r < rows; r++) kernels->quantise(x + (int64_t)r * columns, to, r);
    kernels->linear(matrix, 0, matrix.groups, to, rows, out, (int64_t)matrix.groups * LANES, false,
                    scratch);
    return 0;
}

// Jobs that take a thread some milliseconds, while two have them the second; active[i] = threads that
// job i had.
extern "C" __attribute__((visibility("default"))) void kvist_test_pool(
    int32_t jobs, int32_t milliseconds, int32_t* active) {
    Pool pool(2, {});
    for (int i = 0; i < jobs; i++) {
        active[i] = pool.choose();
        struct Job {
            int32_t milliseconds, last;
        } job{milliseconds, active[i] - 1};
        pool.run(
            [](void* context, int thread) {
                const Job& job = *(const Job*)context;
                if (thread == job.last)
                    std::this_thread::sleep_for(std::chrono::milliseconds(job.milliseconds));
            },
            &job);
    }
}
