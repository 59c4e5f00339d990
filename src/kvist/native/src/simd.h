// Sixteen lanes on each instruction set: the few operations that the kernels are written in.
//
// Included once by each translation unit that is compiled for one instruction set. Everything has
// internal linkage, so that no function built for one processor is ever called on another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int AHEAD = 4096;  // bytes to fetch ahead: a page, where hardware prefetchers stop

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// IEEE half to float, for single values and where the processor has no instruction for it.
inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | rest << 13);
    if (exponent == 0) return bits_to_float(sign | float_to_bits((float)rest * 0x1p-24f));
    return bits_to_float(sign | (exponent + 112) << 23 | rest << 13);
}

// The same where the processor has an instruction: for scales that are read token by token.
inline float quick_half(uint16_t half) {
#if defined(__F16C__)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
    return half_to_float(half);
#endif
}

// Up to 16 of them; two, as heads of 64 channels have, in one go.
inline void quick_halves(const uint16_t* halves, int count, float* out) {
#if defined(__F16C__)
    if (count == 2) {
        uint32_t both;
        memcpy(&both, halves, 4);
        _mm_storel_pi((__m64*)out, _mm_cvtph_ps(_mm_cvtsi32_si128((int)both)));
        return;
    }
#endif
    for (int i = 0; i < count; i++) out[i] = quick_half(halves[i]);
}

// Nearest IEEE half, ties to even; too large becomes infinite.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000)  // subnormal: its last place is 2^-24, which adding 0.5 rounds to
        return (uint16_t)(sign | (float_to_bits(bits_to_float(size) + 0.5f) - float_to_bits(0.5f)));
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

// Nearest bfloat16, ties to even.
inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);  // NaN stays NaN
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512VNNI__)

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };  // 64 of them; byte 4r+i belongs to lane r

// vpdpbusd multiplies unsigned with signed bytes: q8 corrects its offset by the inputs' sum.
constexpr bool UNSIGNED_DOT = true;
constexpr int MAX_ROWS = 8;  // that one pass over the weights serves from registers

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// 1 / x within an ulp for normal x and 1 / x, by two steps of Newton's: dividing takes four times as long.
inline Floats inverse(Floats x) {
    __m512 y = _mm512_rcp14_ps(x.v);
    y = _mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(1.f)), y, y);
    return {_mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(1.f)), y, y)};
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// a * 2^n for whole n
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline Floats load_half(const uint8_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
inline Floats load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints splat_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x.v); }
inline Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
// acc[r] += sum over i of w[4r+i] * x[i], with the four inputs broadcast inside the instruction.
inline Ints dot(Ints acc, Bytes w, const int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int32_t(*)[1])x));
    return acc;
}
inline Ints dot_q8(Ints acc, Bytes w, const int8_t* x) { return dot(acc, w, x); }
// Round 32 floats to signed bytes (they are in -127..127), store them, return their sum.
inline int32_t store_rounded(int8_t* q, Floats a, Floats b) {
    __m512i x = _mm512_cvtps_epi32(a.v), y = _mm512_cvtps_epi32(b.v);
    _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8(x));
    _mm_storeu_si128((__m128i*)(q + 16), _mm512_cvtepi32_epi8(y));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(x, y));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

inline Floats load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline void load_nibbles(const uint8_t* p, Floats& low, Floats& high) {
    __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    low = {_mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)))};
    high = {_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4))};
}
// Lane i becomes lane i ^ STEP.
template <int STEP> inline Floats swapped(Floats x) {
    if (STEP == 1) return {_mm512_permute_ps(x.v, 0xb1)};
    if (STEP == 2) return {_mm512_permute_ps(x.v, 0x4e)};
    if (STEP == 4) return {_mm512_shuffle_f32x4(x.v, x.v, 0xb1)};
    return {_mm512_shuffle_f32x4(x.v, x.v, 0x4e)};
}
// x, zero where `score` is minus infinity.
inline Floats where_seen(Floats score, Floats x) {
    __mmask16 seen = _mm512_cmp_ps_mask(score.v, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
    return {_mm512_maskz_mov_ps(seen, x.v)};
}

// Lane i of the result is the sum of all lanes of x[i]: a tree of 15 additions.
inline Floats sums_of(const Floats* x) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                             _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 4; i++) {
        __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                          _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

#elif defined(__AVX2__)

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };

constexpr bool UNSIGNED_DOT = false;
constexpr int MAX_ROWS = 2;

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats operator+(Floats x, Floats y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Floats operator-(Floats x, Floats y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Floats operator*(Floats x, Floats y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Floats operator/(Floats x, Floats y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline Floats inverse(Floats x) { return splat(1.f) / x; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats max(Floats x, Floats y) {
    return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline Floats abs(Floats x) {
    __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats round(Floats x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 power_of_two(__m256 n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline Floats scale_by_power(Floats x, Floats n) {
    return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline float sum(Floats x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float maximum(Floats x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline Floats load_half(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline Floats load_bf16(const uint16_t* p) {
    __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints operator+(Ints x, Ints y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline void store_bytes(uint8_t* p, Bytes x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 32), x.b);
}
inline Bytes low_nibbles(Bytes x) {
    __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {  // w unsigned, |sum of two| < 2^15
    __m256i pairs = _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints dot(Ints acc, Bytes w, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    __m256i v = _mm256_set1_epi32(four);
    return {dot_half(acc.a, w.a, v), dot_half(acc.b, w.b, v)};
}
// Two products of full bytes would saturate 16 bits when one factor is unsigned, so |w| takes its
// sign to the other side: at most 128 * 127 * 2 = 32,512.
inline __m256i dot_half_signed(__m256i acc, __m256i w, __m256i x) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return dot_half(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
inline Ints dot_q8(Ints acc, Bytes w, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    __m256i v = _mm256_set1_epi32(four);
    return {dot_half_signed(acc.a, w.a, v), dot_half_signed(acc.b, w.b, v)};
}
inline int32_t store_rounded(int8_t* q, Floats x, Floats y) {
    Floats all[2] = {x, y};
    int32_t total = 0;
    alignas(32) int32_t whole[16];
    for (int half = 0; half < 2; half++) {
        _mm256_store_si256((__m256i*)whole, _mm256_cvtps_epi32(all[half].a));
        _mm256_store_si256((__m256i*)(whole + 8), _mm256_cvtps_epi32(all[half].b));
        for (int i = 0; i < 16; i++) q[16 * half + i] = (int8_t)whole[i], total += q[16 * half + i];
    }
    return total;
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline Floats load_i8(const int8_t* p) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline void load_nibbles(const uint8_t* p, Floats& low, Floats& high) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    __m256i a = _mm256_cvtepu8_epi32(x), b = _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8));
    __m256i mask = _mm256_set1_epi32(15);
    low = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)),
           _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
    high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}
template <int STEP> inline Floats swapped(Floats x) {
    if (STEP == 1) return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)};
    if (STEP == 2) return {_mm256_permute_ps(x.a, 0x4e), _mm256_permute_ps(x.b, 0x4e)};
    if (STEP == 4)
        return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
    return {x.b, x.a};
}
inline Floats where_seen(Floats score, Floats x) {
    __m256 hidden = _mm256_set1_ps(-__builtin_inff());
    return {_mm256_and_ps(_mm256_cmp_ps(score.a, hidden, _CMP_NEQ_UQ), x.a),
            _mm256_and_ps(_mm256_cmp_ps(score.b, hidden, _CMP_NEQ_UQ), x.b)};
}
inline Floats sums_of(const Floats* x) {
    alignas(32) float each[16];
    for (int i = 0; i < 16; i++) each[i] = sum(x[i]);
    return load(each);
}

#else  // plain loops, which compilers turn into what the processor has

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };

constexpr bool UNSIGNED_DOT = false;
constexpr int MAX_ROWS = 2;

#define KVIST_EACH(expression)                                  \
    Floats out;                                                 \
    for (int i = 0; i < 16; i++) out.v[i] = (expression);       \
    return out

inline Floats load(const float* p) { Floats x; memcpy(x.v, p, 64); return x; }
inline void store(float* p, Floats x) { memcpy(p, x.v, 64); }
inline Floats splat(float x) { KVIST_EACH(x); }
inline Floats operator+(Floats a, Floats b) { KVIST_EACH(a.v[i] + b.v[i]); }
inline Floats operator-(Floats a, Floats b) { KVIST_EACH(a.v[i] - b.v[i]); }
inline Floats operator*(Floats a, Floats b) { KVIST_EACH(a.v[i] * b.v[i]); }
inline Floats operator/(Floats a, Floats b) { KVIST_EACH(a.v[i] / b.v[i]); }
inline Floats inverse(Floats x) { return splat(1.f) / x; }
inline Floats fma(Floats a, Floats b, Floats c) { KVIST_EACH(a.v[i] * b.v[i] + c.v[i]); }
inline Floats max(Floats a, Floats b) { KVIST_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats abs(Floats a) { KVIST_EACH(__builtin_fabsf(a.v[i])); }
inline Floats round(Floats a) { KVIST_EACH(__builtin_rintf(a.v[i])); }
inline Floats scale_by_power(Floats a, Floats n) {
    KVIST_EACH(a.v[i] * bits_to_float((uint32_t)((int32_t)n.v[i] + 127) << 23));
}
inline float sum(Floats a) {
    float total = 0;
    for (float each : a.v) total += each;
    return total;
}
inline float maximum(Floats a) {
    float most = a.v[0];
    for (float each : a.v) most = each > most ? each : most;
    return most;
}
inline Floats load_half(const uint8_t* p) {
    uint16_t half[16];
    memcpy(half, p, 32);
    KVIST_EACH(half_to_float(half[i]));
}
inline Floats load_bf16(const uint16_t* p) { KVIST_EACH(bits_to_float((uint32_t)p[i] << 16)); }
inline Floats to_floats(Ints a) { KVIST_EACH((float)a.v[i]); }
inline Ints splat_int(int32_t x) { Ints out; for (int32_t& each : out.v) each = x; return out; }
inline Ints operator+(Ints a, Ints b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}
inline Bytes load_bytes(const uint8_t* p) { Bytes x; memcpy(x.v, p, 64); return x; }
inline void store_bytes(uint8_t* p, Bytes x) { memcpy(p, x.v, 64); }
inline Bytes low_nibbles(Bytes x) { for (uint8_t& each : x.v) each &= 15; return x; }
inline Bytes high_nibbles(Bytes x) { for (uint8_t& each : x.v) each >>= 4; return x; }
inline Ints dot(Ints acc, Bytes w, const int8_t* x) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) acc.v[r] += w.v[4 * r + i] * x[i];
    return acc;
}
inline Ints dot_q8(Ints acc, Bytes w, const int8_t* x) {
    for (int r = 0; r < 16; r++)
        for (int i = 0; i < 4; i++) acc.v[r] += ((int)w.v[4 * r + i] - 128) * x[i];
    return acc;
}
inline int32_t store_rounded(int8_t* q, Floats a, Floats b) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) {
        int x = (int)__builtin_rintf(a.v[i]), y = (int)__builtin_rintf(b.v[i]);
        q[i] = (int8_t)x, q[16 + i] = (int8_t)y, total += q[i] + q[16 + i];  // no overflow, NaN or not
    }
    return total;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline Floats sums_of(const Floats* x) { KVIST_EACH(sum(x[i])); }
inline Floats load_i8(const int8_t* p) { KVIST_EACH((float)p[i]); }
inline void load_nibbles(const uint8_t* p, Floats& low, Floats& high) {
    for (int i = 0; i < 16; i++) low.v[i] = (float)(p[i] & 15), high.v[i] = (float)(p[i] >> 4);
}
template <int STEP> inline Floats swapped(Floats x) { KVIST_EACH(x.v[i ^ STEP]); }
inline Floats where_seen(Floats score, Floats x) {
    KVIST_EACH(score.v[i] == -__builtin_inff() ? 0.f : x.v[i]);
}
#undef KVIST_EACH

#endif

// e^x within 2e-7 relative, 0 below -87: 2^n times a polynomial on [-0.5, 0.5] (Cephes).
inline Floats exponential(Floats x) {
    x = max(splat(-87.f), x);  // in this order NaN stays NaN
    Floats n = round(x * splat(1.44269504f));
    Floats r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.f));
    return scale_by_power(p, n);
}

inline Floats silu(Floats x) {
    return x * inverse(splat(1.f) + exponential(splat(0.f) - max(splat(-87.f), x)));
}

}  // namespace
