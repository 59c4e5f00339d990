// A decoder's weights, packed for the kernels, and the scratch and threads that its steps use.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "screen.h"

namespace kvist {

// Sizes of a decoder, as the caller's binding declares them too (library.py).
struct Shape {
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, qk_norm;
    float norm_eps, rotation_scale;  // the factor on cosines and sines
};

// The matrices of a layer, in the order that the binding gives them.
enum Slot : int32_t { Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE, UP, DOWN, SLOTS };

// How a file stores rows; values are this library's own.
enum Stored : int32_t { STORED_Q4_0, STORED_Q4_1, STORED_Q8_0, STORED_F32, STORED_F16, STORED_BF16 };
int64_t stored_row_bytes(Stored type, int64_t columns);
Kind kind_of(Stored type);  // what its rows are packed as
void read_row(Stored type, const uint8_t* row, int64_t columns, float* out);

// Memory that comes zeroed and in large pages where the system has them.
class Arena {
  public:
    explicit Arena(int64_t bytes);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    uint8_t* take(int64_t bytes);  // aligned to 64

  private:
    uint8_t* base_;
    int64_t size_, used_ = 0;
};

struct Layer {
    Matrix matrices[SLOTS];
    std::vector<float> input_norm, post_norm, q_norm, k_norm;
};

struct Model {
    Model(const Shape& shape, const Kernels* kernels, int threads, std::vector<int> cpus);

    Shape shape;
    const Kernels* kernels;
    Pool pool;
    std::vector<Layer> layers;
    Matrix head{};
    std::unique_ptr<Screen> screen;  // of the head, if who runs steps has asked for one
    std::vector<float> norm, frequencies;  // frequencies: head_dim / 2
    const uint8_t* embedding = nullptr;    // the file's own rows, kept by the caller
    Stored embedding_type = STORED_F32;

    int32_t rows(Slot slot) const;
    int32_t columns(Slot slot) const;
    // Where matrices lie is decided once, from all their kinds, in the order of their use.
    void lay_out(const int32_t* kinds, int32_t head_kind);

  private:
    std::unique_ptr<Arena> arena_;
};

// Fill a matrix that was laid out from the file's rows, `count` of them; more are zero.
void pack(Pool& pool, bool tiles, const Matrix& matrix, Stored type, const uint8_t* rows,
          int32_t count);

// The best kernels for this processor, or those of a name; null where it cannot run them.
const Kernels* kernels_named(const char* name);

}  // namespace kvist
