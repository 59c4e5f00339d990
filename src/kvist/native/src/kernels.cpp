// The table of kernels for one instruction set: compiled once for each, with KVIST_ISA its name.
#include "attention.h"
#include "coarse.h"
#include "linear.h"
#include "vectors.h"

namespace {

void gate_up(const Matrix& gate, const Matrix& up, int begin, int end, const Activations& x,
             int rows, const Activations& to, void* scratch) {
    gate_up_with(linear, quantise_block, gate, up, begin, end, x, rows, to, scratch);
}

}  // namespace

#define KVIST_JOIN(a, b) a##b
#define KVIST_TABLE(isa) KVIST_JOIN(kernels_, isa)
#define KVIST_TEXT(isa) #isa
#define KVIST_NAME(isa) KVIST_TEXT(isa)

namespace kvist {

const Kernels* KVIST_TABLE(KVIST_ISA)() {
    static const Kernels table = {
        KVIST_NAME(KVIST_ISA), false,    12,       nullptr, quantise, norm_quantise, norm,
        linear,                gate_up,
#if defined(__AVX512VNNI__)
        coarse_products,       coarse_bounds, coarse_reaching,
#else
        nullptr,               nullptr,  nullptr,
#endif
        rotate,                unrotate, store_token,
        ::attend,              merge,    argmax,   all_finite,
    };
    return &table;
}

}  // namespace kvist
