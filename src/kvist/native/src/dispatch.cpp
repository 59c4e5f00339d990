// Which instruction set to run on this processor.
#include <cstring>

#include "model.h"

namespace kvist {
namespace {

const Kernels* best_kernels() {
#if defined(KVIST_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (const Kernels* wide = kernels_amx()) return wide;
        return kernels_avx512();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
    return kernels_portable();
}

}  // namespace

const Kernels* kernels_named(const char* name) {
    if (!name || !*name) return best_kernels();
    if (!strcmp(name, "portable")) return kernels_portable();
#if defined(KVIST_X86)
    const char* best = best_kernels()->name;
    if (!strcmp(name, "avx2") && strcmp(best, "portable")) return kernels_avx2();
    if (!strcmp(name, "avx512") && (!strcmp(best, "avx512") || !strcmp(best, "amx"))) return kernels_avx512();
    if (!strcmp(name, "amx") && !strcmp(best, "amx")) return kernels_amx();
#endif
    return nullptr;
}

}  // namespace kvist
