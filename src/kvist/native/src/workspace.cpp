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

Activations cut_activations(Cutter& cutter, int64_t rows, int32_t columns, const Model& model) {
    Activations cut{};
    cut.columns = columns;
    if (in_floats(model.head.kind)) {  // as all matrices are, or none
        cut.floats = cutter.take<float>(rows * columns);
        return cut;
    }
    rows = (rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    if (model.kernels->tiles) {
        cut.tiles = cutter.take<uint16_t>(rows * columns);
        return cut;
    }
    const int64_t blocks = rows * (columns / BLOCK);
    cut.q = cutter.take<int8_t>(rows * columns);
    cut.scale = cutter.take<float>(blocks);
    cut.sum = cutter.take<float>(blocks);
    cut.isum = cutter.take<int32_t>(blocks);
    return cut;
}

void cut(Workspace& space, Cutter& cutter, const Model& model) {
    const Shape& s = model.shape;
    const int threads = model.pool.threads();
    const int64_t q_size = (int64_t)s.heads * s.head_dim, kv_size = (int64_t)s.kv_heads * s.head_dim;
    const int32_t narrow = s.hidden > q_size ? s.hidden : (int32_t)q_size;
    const int32_t widest = narrow > s.intermediate ? narrow : s.intermediate;
    const int64_t rows = space.rows;
    space.x = cutter.take<float>(rows * s.hidden);
    space.projected = cutter.take<float>(rows * (q_size + 2 * kv_size));
    space.attended = cutter.take<float>(rows * q_size);
    space.rotation = cutter.take<float>(rows * s.head_dim);
    space.parts = cutter.take<float>(space.spans * s.heads * part_record(s.head_dim));
    space.shared = cut_activations(cutter, rows, narrow, model);
    space.intermediate = cut_activations(cutter, rows, s.intermediate, model);
    space.own.clear(), space.scratch.clear();
    for (int t = 0; t < threads; t++) {
        space.own.push_back(cut_activations(cutter, FEW_ROWS, narrow, model));
        space.scratch.push_back(cutter.take<uint8_t>(scratch_bytes(widest, rows)));
    }
}

}  // namespace

void Workspace::reserve(const Model& model, int32_t wanted_rows, int64_t wanted_spans) {
    if (wanted_rows <= rows && wanted_spans <= spans) return;
    if (wanted_rows > rows) rows = wanted_rows;
    if (wanted_spans > spans) spans = wanted_spans + wanted_spans / 2 + 16;
    Cutter measure(nullptr);
    cut(*this, measure, model);
    memory.reset();
    memory = std::make_unique<Arena>(measure.used() + 4096);
    Cutter cutter(memory->take(measure.used()));
    cut(*this, cutter, model);
}

}  // namespace kvist
