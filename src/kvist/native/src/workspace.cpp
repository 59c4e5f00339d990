#include "step.h"

namespace kvist {
namespace {

// Hands out 64-byte aligned pieces of one allocation; the first round only measures.
class Cutter {
  public:
    explicit Cutter(uint8_t* base) : base_(base) {}
    template <typename T> T* take(int64_t count) {
        T* piece = base_ ? (T*)(base_ + used_) : nullptr;
        used_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    uint8_t* base_;
    int64_t used_ = 0;
};

Activations cut_activations(Cutter& cutter, int64_t rows, int32_t columns, bool wide) {
    const int64_t blocks = rows * (columns / BLOCK);
    Activations made{};
    made.columns = columns;
    if (wide) {
        made.wide = cutter.take<uint16_t>((rows + 31) / 32 * 32 * columns);
    } else {
        made.q = cutter.take<int8_t>(rows * columns);
        made.scale = cutter.take<float>(blocks);
        made.sum = cutter.take<float>(blocks);
        made.isum = cutter.take<int32_t>(blocks);
    }
    return made;
}

void cut(Workspace& space, Cutter& cutter, const Model& model) {
    const Shape& s = model.shape;
    const int threads = model.pool.threads();
    const int64_t q_size = (int64_t)s.heads * s.head_dim, kv_size = (int64_t)s.kv_heads * s.head_dim;
    const int32_t narrow = s.hidden > q_size ? s.hidden : (int32_t)q_size;
    const int32_t widest = narrow > s.intermediate ? narrow : s.intermediate;
    const int64_t rows = space.rows;
    const bool wide = model.kernels.wide_from && rows >= model.kernels.wide_from;
    space.x = cutter.take<float>(rows * s.hidden);
    space.projected = cutter.take<float>(rows * (q_size + 2 * kv_size));
    space.attended = cutter.take<float>(rows * q_size);
    space.rotation = cutter.take<float>(rows * s.head_dim);
    const int64_t split = threads > rows ? rows : threads;  // tokens whose context is split
    space.parts = cutter.take<float>(threads * split * q_size);
    space.part_max = cutter.take<float>(threads * split * s.heads);
    space.part_weight = cutter.take<float>(threads * split * s.heads);
    space.scores = cutter.take<float>(threads * model.scores_of_thread(space.context));
    space.shared = cut_activations(cutter, rows, narrow, false);
    space.intermediate = cut_activations(cutter, rows, s.intermediate, false);
    if (wide) {
        space.shared.wide = cut_activations(cutter, rows, narrow, true).wide;
        space.intermediate.wide = cut_activations(cutter, rows, s.intermediate, true).wide;
    }
    space.own.clear(), space.scratch.clear();
    for (int t = 0; t < threads; t++) {
        space.own.push_back(cut_activations(cutter, FEW_ROWS, narrow, false));
        space.scratch.push_back(cutter.take<uint8_t>(scratch_bytes(widest, rows)));
    }
}

}  // namespace

void Workspace::reserve(const Model& model, int32_t wanted_rows, int32_t wanted_context) {
    if (wanted_rows <= rows && wanted_context <= context) return;
    if (wanted_rows > rows) rows = wanted_rows;
    if (wanted_context > context) context = wanted_context + wanted_context / 2 + 64;
    Cutter measure(nullptr);
    cut(*this, measure, model);
    memory.reset();
    memory = std::make_unique<Arena>(measure.used() + 4096);
    Cutter cutter(memory->take(measure.used()));
    cut(*this, cutter, model);
}

}  // namespace kvist
