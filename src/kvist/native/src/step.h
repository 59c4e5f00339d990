// One forward pass over some tokens of some sequences, in one call.
#pragma once
#include <cstdint>

#include "model.h"

namespace kvist {

// The caller's binding (library.py) declares the same fields.

// One side of one layer's cache; see HeadPlane. Strides in elements from block to block, token to
// token, head to head; those of scale and zero are alike.
struct PlaneInput {
    void* x;
    uint16_t *scale, *zero;
    const float* centre;  // [kv_heads, head_dim] or null
    int64_t block_stride, token_stride, head_stride;
    int64_t scale_block_stride, scale_token_stride, scale_head_stride;
    int32_t element, group;
};

struct LayerInput {
    PlaneInput key, value;
    const int32_t* table;  // [sequences, table_width] blocks
    int64_t table_width;
    int32_t block_size;
    int32_t window, sinks;  // window 0: all is seen
    int32_t ring;           // places that positions go around in, behind the sinks; 0: none
};

// Tokens of sequence b are the rows [query_starts[b], query_starts[b + 1]) and take the last
// positions before kv_lens[b].
struct StepInput {
    int32_t tokens, sequences, logit_count, unused;
    const int64_t* token_ids;     // [tokens], where there are no embeddings
    const float* embeddings;      // [tokens, hidden] or null
    const int64_t* rotations;     // [tokens], each token's position for rotation
    const int32_t* query_starts;  // [sequences + 1]
    const int32_t* kv_lens;       // [sequences]
    const int64_t* logit_rows;    // [logit_count], ascending
    const LayerInput* layers;     // [layers]
    // [logit_count, groups of the head * 16]; null: of one row only the largest is wanted.
    float* logits;
    // Of each of `logits` the first largest, -1 where a number is not finite; or null.
    int64_t* largest;
};

// Scratch for steps, grown as they ask for more and kept from one to the next.
struct Workspace {
    int32_t rows = 0;
    int64_t spans = 0;  // of all rows together, where spans are dealt out
    std::unique_ptr<Arena> memory;

    float *x, *projected, *attended, *rotation;
    float* parts;  // [spans, heads, part_record]
    Activations shared, intermediate;
    std::vector<Activations> own;  // a thread's, for few rows
    std::vector<uint8_t*> scratch;

    void reserve(const Model& model, int32_t rows, int64_t spans);
};

// Few rows are prepared by each thread for itself, which is cheaper than waiting for one another.
constexpr int FEW_ROWS = 8;
// From this many rows for each thread on, threads divide the rows among them, else the weights.
constexpr int APART_ROWS = 64;
// Most rows of a pass over the weights, for each thread and in all; longer inputs take several.
constexpr int THREAD_ROWS = 256, PASS_ROWS = 2048;

// Room for a pass of most rows over some thousand positions.
void reserve_pass(Model& model, Workspace& space);
void run_step(Model& model, Workspace& space, const StepInput& input);

}  // namespace kvist
