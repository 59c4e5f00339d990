// The C interface that library.py binds: plain numbers and pointers, errors as return values.
#include <cstring>
#include <mutex>
#include <new>

#include "step.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

using namespace kvist;

namespace {

struct Handle {
    Handle(const Shape& shape, const Kernels* table, int threads, std::vector<int> cpus)
        : model(shape, table, threads, std::move(cpus)) {}
    Model model;
    Workspace space;
    std::mutex one_at_a_time;
};

}  // namespace

#define KVIST_API extern "C" __attribute__((visibility("default")))

// Raised by one whenever a signature or a structure changes.
KVIST_API int32_t kvist_interface() { return 5; }

KVIST_API const char* kvist_best_isa() { return kernels_named("")->name; }

// Null where there is no memory, or no such instruction set here.
KVIST_API Handle* kvist_model_new(const Shape* shape, const char* isa, int32_t threads,
                                  const int32_t* cpus, int32_t num_cpus) {
    const Kernels* table = kernels_named(isa);
    if (!table) return nullptr;
    try {
        return new Handle(*shape, table, threads, std::vector<int>(cpus, cpus + num_cpus));
    } catch (...) {
        return nullptr;
    }
}

KVIST_API void kvist_model_free(Handle* handle) { delete handle; }

KVIST_API const char* kvist_model_isa(const Handle* handle) { return handle->model.kernels->name; }

KVIST_API int32_t kvist_model_lay_out(Handle* handle, const int32_t* kinds, int32_t head_kind) {
    try {
        handle->model.lay_out(kinds, head_kind);
        reserve_pass(handle->model, handle->space);  // else the first prompt would wait for memory
        return 0;
    } catch (...) {
        return 1;
    }
}

// layer -1 is the head. `rows` are the file's, `count` of them, from the matrix's first on.
KVIST_API void kvist_model_pack(Handle* handle, int32_t layer, int32_t slot, int32_t stored,
                                const uint8_t* rows, int32_t count) {
    Model& model = handle->model;
    const Matrix& matrix = layer < 0 ? model.head : model.layers[layer].matrices[slot];
    pack(model.pool, model.kernels->tiles, matrix, (Stored)stored, rows, count);
}

// slot: 0 input norm, 1 post norm, 2 q norm, 3 k norm; layer -1: 0 the last norm, 1 frequencies.
KVIST_API void kvist_model_vector(Handle* handle, int32_t layer, int32_t slot, const float* values,
                                  int32_t size) {
    Model& model = handle->model;
    std::vector<float>* to;
    if (layer < 0) {
        to = slot == 0 ? &model.norm : &model.frequencies;
    } else {
        Layer& at = model.layers[layer];
        to = slot == 0 ? &at.input_norm : slot == 1 ? &at.post_norm : slot == 2 ? &at.q_norm : &at.k_norm;
    }
    to->assign(values, values + size);
}

KVIST_API void kvist_model_embedding(Handle* handle, int32_t stored, const uint8_t* rows) {
    handle->model.embedding = rows;
    handle->model.embedding_type = (Stored)stored;
}

// Prepare for steps that leave the logits out. 1, or 0 where this model or machine has no such steps.
KVIST_API int32_t kvist_model_screen(Handle* handle) {
    const std::lock_guard<std::mutex> lock(handle->one_at_a_time);
    Model& model = handle->model;
    if (!model.kernels->bound || model.head.kind != Q8) return 0;
    try {
        if (!model.screen)
            model.screen = std::make_unique<Screen>(model.pool, *model.kernels, model.head);
        return 1;
    } catch (...) {
        return 0;
    }
}

// 0; 1 where there is no memory for it; 2 where a token is none of the vocabulary's, and then the
// planes are untouched.
KVIST_API int32_t kvist_step(Handle* handle, const StepInput* input) {
    const std::lock_guard<std::mutex> lock(handle->one_at_a_time);
    for (int i = 0; i < input->tokens && !input->embeddings; i++)
        if (input->token_ids[i] < 0 || input->token_ids[i] >= handle->model.shape.vocab) return 2;
    try {
        run_step(handle->model, handle->space, *input);
        return 0;
    } catch (...) {
        return 1;
    }
}

// Give back the pages of a clean, private file mapping; they are read again when touched.
KVIST_API void kvist_forget_pages(const uint8_t* data, int64_t size) {
#if defined(__linux__)
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)size) / page * page;
    if (begin < end) madvise((void*)begin, end - begin, MADV_DONTNEED);
#else
    (void)data, (void)size;
#endif
}

KVIST_API int64_t kvist_argmax(const float* x, int64_t size) { return kernels_named("")->argmax(x, size); }
