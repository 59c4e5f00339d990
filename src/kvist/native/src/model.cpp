#include "model.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simd.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvist {

int64_t stored_row_bytes(Stored type, int64_t columns) {
    switch (type) {
        case STORED_Q4_0: return columns / 32 * 18;
        case STORED_Q4_1: return columns / 32 * 20;
        case STORED_Q8_0: return columns / 32 * 34;
        case STORED_F32: return columns * 4;
        default: return columns * 2;
    }
}

Kind kind_of(Stored type) {
    switch (type) {
        case STORED_Q8_0: return Q8;
        case STORED_F32:
        case STORED_F16: return W32;
        case STORED_BF16: return W16;
        default: return Q4;
    }
}

namespace {

uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    memcpy(&half, p, 2);
    return half;
}

// Q4_0's weight is d * (nibble - 8): Q4_1's with the minimum -8 d, exact unless it overflows.
uint16_t minus_eight_times(uint16_t half) {
    const int exponent = half >> 10 & 31;
    uint16_t sign = (half ^ 0x8000) & 0x8000, size = half & 0x7fff;
    if (exponent == 0) {  // subnormal: shift until it is none
        int value = size * 8;
        if (value < 1024) return sign | (uint16_t)value;
        int e = 1;
        while (value >= 2048) value >>= 1, e++;  // exact: at most three bits were shifted in
        return sign | (uint16_t)(e << 10) | (uint16_t)(value & 1023);
    }
    return exponent + 3 >= 31 ? sign | 0x7c00 : sign | (uint16_t)(size + (3 << 10));
}

// One group of 16 rows; those that are null stay zero. See kernels.h for both orders.
void pack_q4(uint8_t* to, const uint8_t* const* rows, int blocks, bool has_minimum, bool tiles) {
    const int bytes = has_minimum ? 20 : 18;
    for (int b = 0; b < blocks; b++, to += Q4_BLOCK)
        for (int r = 0; r < LANES; r++) {
            if (!rows[r]) continue;
            const uint8_t* block = rows[r] + b * bytes;
            const uint16_t m = has_minimum ? half_at(block + 2) : minus_eight_times(half_at(block));
            memcpy(to + 256 + 2 * r, block, 2);
            memcpy(to + 288 + 2 * r, &m, 2);
            const uint8_t* nibbles = block + bytes - 16;
            if (!tiles) {
                for (int j = 0; j < 4; j++) memcpy(to + 64 * j + 4 * r, nibbles + 4 * j, 4);
                continue;
            }
            uint16_t* words = (uint16_t*)(to + r / 4 * 64);
            auto put = [&](int input, int nibble) {
                words[input] |= std::rotl((uint16_t)(nibble << r % 4 * 4), 1);
            };
            for (int i = 0; i < 16; i++) put(i, nibbles[i] & 15), put(16 + i, nibbles[i] >> 4);
        }
}

void pack_q8(uint8_t* to, const uint8_t* const* rows, int blocks, bool tiles) {
    for (int b = 0; b < blocks; b++, to += Q8_BLOCK)
        for (int r = 0; r < LANES; r++) {
            if (!rows[r]) continue;
            const uint8_t* block = rows[r] + b * 34;
            memcpy(to + 512 + 2 * r, block, 2);
            if (tiles) {
                memcpy(to + 32 * r, block + 2, 32);
                continue;
            }
            for (int j = 0; j < 8; j++) {
                uint32_t four;
                memcpy(&four, block + 2 + 4 * j, 4);
                four ^= 0x80808080u;
                memcpy(to + 64 * j + 4 * r, &four, 4);
            }
        }
}

// Columns of 16 rows, as floats or as the halves that bfloat16 is.
void pack_floats(uint8_t* to, const uint8_t* const* rows, int columns, Stored type) {
    std::vector<float> row(columns);
    for (int r = 0; r < LANES; r++) {
        if (!rows[r]) continue;
        if (type == STORED_BF16) {
            for (int c = 0; c < columns; c++) memcpy(to + (c * LANES + r) * 2, rows[r] + 2 * c, 2);
            continue;
        }
        read_row(type, rows[r], columns, row.data());
        for (int c = 0; c < columns; c++) ((float*)to)[c * LANES + r] = row[c];
    }
}

int32_t groups_of(int32_t rows) { return (rows + LANES - 1) / LANES; }

int64_t group_bytes(Kind kind, int32_t columns) {
    return (int64_t)columns / BLOCK * block_bytes(kind);
}

constexpr int64_t LARGE_PAGE = 2 << 20;

}  // namespace

void read_row(Stored type, const uint8_t* row, int64_t columns, float* out) {
    switch (type) {
        case STORED_F32: memcpy(out, row, columns * 4); return;
        case STORED_F16:
            for (int64_t i = 0; i < columns; i++) out[i] = half_to_float(half_at(row + 2 * i));
            return;
        case STORED_BF16:
            for (int64_t i = 0; i < columns; i++)
                out[i] = bits_to_float((uint32_t)half_at(row + 2 * i) << 16);
            return;
        default: break;
    }
    const int64_t bytes = stored_row_bytes(type, BLOCK);
    for (int64_t b = 0; b < columns / BLOCK; b++, row += bytes, out += BLOCK) {
        const float d = half_to_float(half_at(row));
        if (type == STORED_Q8_0) {
            for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)row[2 + i];
            continue;
        }
        const uint8_t* nibbles = row + bytes - 16;
        const float m = type == STORED_Q4_1 ? half_to_float(half_at(row + 2)) : -8.f * d;
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(nibbles[i] & 15) + m;
            out[16 + i] = d * (float)(nibbles[i] >> 4) + m;
        }
    }
}

Arena::Arena(int64_t bytes) : size_((bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE) {
    base_ = (uint8_t*)std::aligned_alloc(LARGE_PAGE, size_);
    if (!base_) throw std::bad_alloc();
#if defined(__linux__)
    madvise(base_, size_, MADV_HUGEPAGE);
#endif
    memset(base_, 0, size_);
}

Arena::~Arena() { std::free(base_); }

uint8_t* Arena::take(int64_t bytes) {
    uint8_t* taken = base_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    if (used_ > size_) throw std::bad_alloc();
    return taken;
}

Model::Model(const Shape& given, const Kernels* table, int threads, std::vector<int> cpus)
    : shape(given), kernels(table), pool(threads, std::move(cpus)), layers(given.layers) {}

int32_t Model::rows(Slot slot) const {
    switch (slot) {
        case Q_PROJ: return shape.heads * shape.head_dim;
        case K_PROJ:
        case V_PROJ: return shape.kv_heads * shape.head_dim;
        case GATE:
        case UP: return shape.intermediate;
        default: return shape.hidden;
    }
}

int32_t Model::columns(Slot slot) const {
    if (slot == O_PROJ) return shape.heads * shape.head_dim;
    return slot == DOWN ? shape.intermediate : shape.hidden;
}

void Model::lay_out(const int32_t* kinds, int32_t head_kind) {
    if (in_floats((Kind)head_kind) && kernels->for_floats) kernels = kernels->for_floats;
    int64_t total = 64 * (int64_t)(shape.layers * SLOTS + 1);
    for (int l = 0; l < shape.layers; l++)
        for (int s = 0; s < SLOTS; s++)
            total += groups_of(rows((Slot)s)) *
                     group_bytes((Kind)kinds[l * SLOTS + s], columns((Slot)s));
    const int64_t head_stride = group_bytes((Kind)head_kind, shape.hidden);
    // Kernels fetch a page ahead of what they read; what lies there is never used.
    arena_ = std::make_unique<Arena>(total + groups_of(shape.vocab) * head_stride + 8192);
    for (int l = 0; l < shape.layers; l++) {
        Layer& layer = layers[l];
        for (int s = 0; s < SLOTS; s++) {
            const Kind kind = (Kind)kinds[l * SLOTS + s];
            const int32_t groups = groups_of(rows((Slot)s)), width = columns((Slot)s);
            const int64_t stride = group_bytes(kind, width);
            layer.matrices[s] = {nullptr, stride, groups, width, kind};
            if (s != GATE && s != UP) layer.matrices[s].data = arena_->take(groups * stride);
        }
        // Gate and up are read together: two groups of the one, two of the other, in turn.
        Matrix &gate = layer.matrices[GATE], &up = layer.matrices[UP];
        uint8_t* both = arena_->take(gate.groups * gate.stride + up.groups * up.stride);
        const bool alternate = gate.kind == up.kind;
        gate.data = both;
        up.data = both + (alternate ? gate.stride : gate.groups * gate.stride);
        if (alternate) gate.stride = up.stride = 2 * gate.stride;
    }
    head = {arena_->take(groups_of(shape.vocab) * head_stride), head_stride,
            groups_of(shape.vocab), shape.hidden, (Kind)head_kind};
}

void pack(Pool& pool, bool tiles, const Matrix& matrix, Stored type, const uint8_t* data,
          int32_t count) {
    const int blocks = matrix.columns / BLOCK;
    const int64_t row_bytes = stored_row_bytes(type, matrix.columns);
    pool.divide(matrix.groups, [&](int, int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++) {
            const uint8_t* rows[LANES];
            for (int r = 0; r < LANES; r++) {
                const int64_t row = g * LANES + r;
                rows[r] = row < count ? data + row * row_bytes : nullptr;
            }
            uint8_t* to = (uint8_t*)matrix.data + g * matrix.stride;
            if (in_floats(matrix.kind)) pack_floats(to, rows, matrix.columns, type);
            else if (type == STORED_Q8_0) pack_q8(to, rows, blocks, tiles);
            else pack_q4(to, rows, blocks, type == STORED_Q4_1, tiles);
        }
    });
}

}  // namespace kvist
