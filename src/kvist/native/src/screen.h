// A coarse copy of the head, for who asks for the likeliest token alone.
//
// A greedy step reads the whole head to learn where its largest logit is. With 5 of 8 bits of each
// weight it learns that nearly as well, and by how much it may be wrong: for a row w of the head, its
// coarse copy c and any positive numbers p,
//
//   |w x - c x| <= |(w - c) sqrt(p)| * |x / sqrt(p)|        (Cauchy and Schwarz)
//
// The first factor is a number for each row, kept. Rows that can still be the largest, a few dozen of
// 50,000, are then read in full, by the kernel that makes all logits: the token is the same to the bit.
// p follows the sizes of x's channels, some of which are a hundred times others: seen as tokens come.
#pragma once
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace kvist {

class Arena;

class Screen {
  public:
    // Makes the copy; throws where there is no memory for it.
    Screen(Pool& pool, const Kernels& kernels, const Matrix& head);

    // Whether rows have their bounds, once `learn` has seen a token, and it pays to look at them.
    bool ready() const { return seen_ > 0 && pause_ == 0; }
    const Matrix& coarse() const { return coarse_; }
    // Room for a row of logits.
    float* logits() const { return logits_; }

    // One row of activations as the copy is multiplied with it.
    struct Query {
        CoarseRow row;
        float length;  // |x / sqrt(p)|
        float rest;    // what rounding x to 16 bits changes in any product, at most
    };
    // What lies in `scratch` is used as long as the query is.
    Query query(const Activations& x, uint8_t* scratch) const;
    // What a row's coarse product may be off by, for a length of one.
    const float* bounds() const { return bounds_; }
    void learn(const Activations& x);
    // How many groups of the head a step has read in full: where most are, all are for a while.
    void judge(int64_t groups_read);

  private:
    Pool& pool_;
    const Kernels& k_;
    const Matrix head_;
    Matrix coarse_;
    std::unique_ptr<Arena> memory_;
    float *bounds_, *logits_;
    std::vector<float> inverse_;  // 1 / p
    std::vector<float> squares_;  // sums over what was seen
    float largest_ = 0;           // a row's |128 d sqrt(p)|
    int64_t seen_ = 0;
    int tries_ = 0, pause_ = 0;  // steps that did not pay, more than did; steps to go without
};

}  // namespace kvist
