// The table of kernels for one instruction set: compiled once for each, with KVIST_ISA its name.
#include "attention.h"
#include "linear.h"
#include "vectors.h"

namespace {

void gate_up(const Matrix& gate, const Matrix& up, int begin, int end, const Activations& x,
             int rows, const Activations& to, void* scratch) {
    float* both = (float*)((uint8_t*)scratch + group_scratch(gate.columns));  // [rows, 64]
    for (int block = begin; block < end; block++) {
        Matrix two = gate;
        two.data += 2 * block * gate.stride;
        linear(two, 0, 2, x, rows, both, 64, false, scratch);
        two = up;
        two.data += 2 * block * up.stride;
        linear(two, 0, 2, x, rows, both + 32, 64, false, scratch);
        for (int r = 0; r < rows; r++) {
            const float* h = both + 64 * r;
            quantise_block(silu(load(h)) * load(h + 32), silu(load(h + 16)) * load(h + 48), to, r,
                           block);
        }
    }
}

}  // namespace

#define KVIST_JOIN(a, b) a##b
#define KVIST_TABLE(isa) KVIST_JOIN(kernels_, isa)
#define KVIST_TEXT(isa) #isa
#define KVIST_NAME(isa) KVIST_TEXT(isa)

namespace kvist {

const Kernels* KVIST_TABLE(KVIST_ISA)() {
    static const Kernels table = {
        KVIST_NAME(KVIST_ISA), 0,       quantise, norm_quantise, norm,  linear, gate_up, rotate,
        store_token,           ::attend, merge,   argmax,
    };
    return &table;
}

}  // namespace kvist
