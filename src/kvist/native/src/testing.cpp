// What the tests call that a step does not: one matrix, and the threads, by themselves.
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "step.h"

using namespace kvist;

namespace {

// A stored matrix, packed, and room for rows of activations.
struct Packed {
    Packed(const Kernels& kernels, Stored stored, const uint8_t* matrix_rows, int32_t count, int32_t columns,
           int32_t rows)
        : matrix{nullptr, (int64_t)columns / BLOCK * block_bytes(kind_of(stored)), (count + 15) / 16, columns,
                 kind_of(stored)},
          packed(matrix.groups * matrix.stride), room(((int64_t)rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE),
          q(room * columns), scale(room * (columns / BLOCK)), sum(scale.size()), isum(scale.size()),
          floats(in_floats(matrix.kind) ? rows * columns : 0),
          arena(scratch_bytes(columns, room) + room * columns * 2) {
        matrix.data = packed.take(matrix.groups * matrix.stride);
        pack(pool, kernels.tiles, matrix, stored, matrix_rows, count);
        scratch = arena.take(scratch_bytes(columns, room));
        to = {q.data(), scale.data(), sum.data(), isum.data(), floats.empty() ? nullptr : floats.data(),
              (uint16_t*)arena.take(room * columns * 2), columns, rows == 1};
        if (!kernels.tiles) to.tiles = nullptr;
    }

    Pool pool{1, {}};
    Matrix matrix;
    Arena packed;
    const int64_t room;
    std::vector<int8_t> q;
    std::vector<float> scale, sum;
    std::vector<int32_t> isum;
    std::vector<float> floats;
    Arena arena;
    uint8_t* scratch;
    Activations to;
};

}  // namespace

// out [rows, ceil(matrix_rows / 16) * 16] = x [rows, columns] times a stored matrix. 0, or 1 where
// this processor has not what the instruction set needs.
extern "C" __attribute__((visibility("default"))) int32_t kvist_test_linear(
    const char* isa, int32_t stored, const uint8_t* matrix_rows, int32_t count, int32_t columns,
    int32_t rows, const float* x, float* out) {
    const Kernels* kernels = kernels_named(isa);
    if (!kernels) return 1;
    if (in_floats(kind_of((Stored)stored)) && kernels->for_floats) kernels = kernels->for_floats;
    Packed p(*kernels, (Stored)stored, matrix_rows, count, columns, rows);
    for (int r = 0; r < rows; r++) kernels->quantise(x + (int64_t)r * columns, p.to, r);
    kernels->linear(p.matrix, 0, p.matrix.groups, p.to, rows, out, (int64_t)p.matrix.groups * LANES, false,
                    p.scratch);
    return 0;
}

// A screen of a stored q8 matrix that has seen the first of x [rows, columns], and then the last of them:
// its exact products, those of the coarse copy, and by how much they may differ. 1 where there is none here.
extern "C" __attribute__((visibility("default"))) int32_t kvist_test_screen(
    const char* isa, const uint8_t* matrix_rows, int32_t count, int32_t columns, int32_t rows, const float* x,
    float* exact, float* coarse, float* apart) {
    const Kernels* kernels = kernels_named(isa);
    if (!kernels || !kernels->coarse) return 1;
    Packed p(*kernels, STORED_Q8_0, matrix_rows, count, columns, 1);
    Screen screen(p.pool, *kernels, p.matrix);
    for (int r = 0; r < rows; r++) {
        kernels->quantise(x + (int64_t)r * columns, p.to, 0);
        if (r + 1 < rows) screen.learn(p.to);
    }
    kernels->linear(p.matrix, 0, p.matrix.groups, p.to, 1, exact, 0, false, p.scratch);
    const Screen::Query query = screen.query(p.to, p.scratch);
    kernels->coarse(screen.coarse(), 0, p.matrix.groups, query.row, coarse);
    for (int i = 0; i < p.matrix.groups * LANES; i++)
        apart[i] = screen.bounds()[i] * query.length + query.rest;
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
