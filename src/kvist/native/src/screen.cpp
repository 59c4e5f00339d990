#include "screen.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"
#include "simd.h"

namespace kvist {
namespace {

// Tokens after which bounds are made anew: channels that are large are so from the first token on.
constexpr int64_t LEARNED[] = {1, 8, 64};

// A block of a q8 group -> its coarse copy; see coarse.h.
void coarsen(const uint8_t* from, bool tiles, uint8_t* to) {
    alignas(64) uint8_t codes[8][64];  // byte 4r + i of vector j: of input 4j + i of row r
    for (int j = 0; j < 8; j++)
        for (int r = 0; r < LANES; r++) {
            uint32_t four;
            memcpy(&four, from + (tiles ? 32 * r + 4 * j : 64 * j + 4 * r), 4);
            if (tiles) four ^= 0x80808080u;
            four = four >> 3 & 0x1f1f1f1fu;
            memcpy(codes[j] + 4 * r, &four, 4);
        }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 64; i++)
            to[64 * j + i] = (uint8_t)((codes[j][i] & 15) | codes[4 + j][i] << 4);
    for (int i = 0; i < 64; i++) {
        uint64_t eight;
        memcpy(&eight, codes[i / 8] + i % 8 * 8, 8);
        // Bit k of the product's highest byte is the lowest of byte k.
        to[256 + i] = (uint8_t)((eight >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
    memcpy(to + 320, from + 512, 32);
}

// The first row of activations, as numbers.
float value_of(const Activations& x, int column) {
    if (!x.tiles) return x.q[column] * x.scale[x.block_at(0, column / BLOCK)];
    return bits_to_float((uint32_t)x.tiles[column] << 16);
}

}  // namespace

Screen::Screen(Pool& pool, const Kernels& kernels, const Matrix& head)
    : pool_(pool), k_(kernels), head_(head), coarse_(head), inverse_(head.columns),
      squares_(head.columns) {
    const int blocks = head.columns / BLOCK;
    coarse_.kind = COARSE;
    coarse_.stride = (int64_t)blocks * COARSE_BLOCK;
    const int64_t rows = (int64_t)head.groups * LANES, data = head.groups * coarse_.stride;
    memory_ = std::make_unique<Arena>(data + 2 * (rows * 4 + 64));
    uint8_t* const to = memory_->take(data);
    coarse_.data = to;
    bounds_ = (float*)memory_->take(rows * 4);
    logits_ = (float*)memory_->take(rows * 4);
    pool.divide(head.groups, [&](int, int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++)
            for (int b = 0; b < blocks; b++)
                coarsen(head_.data + g * head_.stride + b * Q8_BLOCK, k_.tiles,
                        to + g * coarse_.stride + b * COARSE_BLOCK);
    });
}

Screen::Query Screen::query(const Activations& x, uint8_t* scratch) const {
    const int columns = head_.columns, blocks = columns / BLOCK;
    float *const scale = (float*)scratch, *const offset = scale + blocks;
    int8_t *const high = (int8_t*)(offset + blocks), *const low = high + columns;
    double squares = 0, lost = 0;
    for (int b = 0; b < blocks; b++) {
        float values[BLOCK], most = 0.f;
        bool finite = true;
        for (int i = 0; i < BLOCK; i++) {
            values[i] = value_of(x, b * BLOCK + i);
            most = std::max(most, std::fabs(values[i]));
            finite &= std::fabs(values[i]) < HUGE_VALF;
        }
        // A block that is not finite makes products that are none, and then all rows are read in full.
        const float step = finite ? most / 32512.f : NAN, inverse = step > 1e-30f ? 1.f / step : 0.f;
        int32_t total = 0;
        for (int i = 0; i < BLOCK; i++) {
            const int at = b * BLOCK + i;
            const int32_t whole = (int32_t)std::lrintf(finite ? values[i] * inverse : 0.f);
            high[at] = (int8_t)((whole + 128) >> 8);
            low[at] = (int8_t)(whole - 256 * high[at]);
            total += whole;
            const double off = values[i] - (double)step * whole;
            squares += (double)values[i] * values[i] * inverse_[at];
            lost += off * off * inverse_[at];
        }
        scale[b] = 8.f * step;
        offset[b] = -124.5f * step * (float)total;
    }
    constexpr double UP = 1 + 1e-5;
    return {{high, low, scale, offset},
            (float)(std::sqrt(squares) * UP),
            (float)(std::sqrt(lost) * largest_ * UP)};
}

void Screen::judge(int64_t groups_read) {
    if (pause_ > 0) {
        pause_--;
        return;
    }
    // A share of the head is saved, and groups here and there are read more slowly than in a row.
    tries_ = groups_read * 4 > head_.groups ? tries_ + 1 : std::max(tries_ - 1, 0);
    if (tries_ < 8) return;
    pause_ = 256;
    tries_ = 4;
}

void Screen::learn(const Activations& x) {
    if (seen_ >= LEARNED[std::size(LEARNED) - 1]) return;
    const int columns = head_.columns;
    double mean = 0;
    for (int i = 0; i < columns; i++) mean += (double)value_of(x, i) * value_of(x, i);
    if (!(mean < 1e30)) return;  // nothing to be learnt
    for (int i = 0; i < columns; i++) squares_[i] += value_of(x, i) * value_of(x, i);
    seen_++;
    if (std::find(std::begin(LEARNED), std::end(LEARNED), seen_) == std::end(LEARNED)) return;
    mean = 0;
    for (const float square : squares_) mean += square / columns;
    std::vector<float> p(columns), largest(pool_.threads());
    for (int i = 0; i < columns; i++) {
        p[i] = std::sqrt(squares_[i] + 0.01f * (float)mean) + 1e-10f;
        inverse_[i] = 1.f / p[i];
    }
    pool_.divide(head_.groups, [&](int t, int64_t begin, int64_t end) {
        largest[t] = k_.bound(head_, k_.tiles, (int)begin, (int)end, p.data(), bounds_);
    });
    largest_ = *std::max_element(largest.begin(), largest.end());
}

}  // namespace kvist
