// One forward pass over some tokens of some sequences, in one call.
#pragma once
#include <cstdint>

#include "model.h"

namespace kvist {

// What the caller's binding fills in (library.py declares the same fields). Tokens of sequence b
// are the rows [query_starts[b], query_starts[b + 1]) and take the last positions before kv_lens[b].
struct StepInput {
    int32_t tokens, sequences, logit_count;
    int32_t element;             // of the planes, an Element
    const int64_t* token_ids;    // [tokens], where there are no embeddings
    const float* embeddings;     // [tokens, hidden] or null
    const int64_t* rotations;    // [tokens], each token's position for rotation
    const int32_t* query_starts;  // [sequences + 1]
    const int32_t* kv_lens;      // [sequences]
    const int64_t* logit_rows;   // [logit_count], ascending
    void* const* keys;           // [layers], planes
    void* const* values;
    const int32_t* const* tables;  // [layers], [sequences, table_width] blocks
    const int32_t* windows;      // [layers], 0: all is seen
    int64_t table_width;
    int64_t block_size, block_stride, token_stride, head_stride;  // strides in elements
    float* logits;               // [logit_count, groups of the head * 16]
};

// Scratch for steps, grown as they ask for more and kept from one to the next.
struct Workspace {
    int32_t rows = 0, context = 0;
    std::unique_ptr<Arena> memory;

    float *x, *projected, *attended, *rotation;
    float *parts, *part_max, *part_weight, *scores;
    Activations shared, intermediate;
    std::vector<Activations> own;  // a thread's, for few rows
    std::vector<uint8_t*> scratch;

    void reserve(const Model& model, int32_t rows, int32_t context);
};

// Few rows are prepared by each thread for itself, which is cheaper than waiting for one another.
constexpr int FEW_ROWS = 8;
// Most rows of a pass over the weights; longer inputs take several.
constexpr int PASS_ROWS = 512;

void run_step(Model& model, Workspace& space, const StepInput& input);

}  // namespace kvist
