// Splits of contexts, as list.cu lists them for decode.cu.

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int LANES = 32;

// Which part of the context: keys [begin, begin + count) of sequence b, whose query is a row of q.
struct Item {
    int b, row, begin, packed;
    __device__ int count() const { return packed & 0x7FF; }
    __device__ int split() const { return packed >> 11 & 0x3FF; }
    __device__ int splits() const { return (u32)packed >> 21; }
};
