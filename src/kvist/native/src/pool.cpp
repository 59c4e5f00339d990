#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvist {
namespace {

constexpr int SPINS = 2000;  // about 50 microseconds: a few phases
// Nanoseconds from then on in which a thread that waits stays awake: in a job, and between jobs what a
// loop takes to sample and come back.
constexpr int64_t AWAKE = 20'000'000, IDLE_AWAKE = 5'000'000;
// Nanoseconds on one thread before two are tried again.
constexpr int64_t PATIENCE = 25'000'000, MOST_PATIENCE = 1'600'000'000;

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Binds the calling thread to one core, and lets it go again.
class Binding {
  public:
    void set(const std::vector<int>& cpus, int thread, bool bind) {
#if defined(__linux__)
        if (bind == bound_ || cpus.empty()) return;
        if (!bind) {
            pthread_setaffinity_np(pthread_self(), sizeof before_, &before_);
            bound_ = false;
            return;
        }
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpus[thread], &one);
        bound_ = pthread_getaffinity_np(pthread_self(), sizeof before_, &before_) == 0 &&
                 pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
#else
        (void)cpus, (void)thread, (void)bind;
#endif
    }

  private:
#if defined(__linux__)
    cpu_set_t before_;
#endif
    bool bound_ = false;
};

}  // namespace

Pool::Pool(int threads, std::vector<int> cpus)
    : threads_(threads), cpus_(std::move(cpus)), arrived_(new Word[threads]), active_(threads) {
    for (int t = 1; t < threads_; t++) workers_.emplace_back([this, t] { work(t); });
}

Pool::~Pool() {
    job_ = nullptr;
    job_number_.value.fetch_add(1, std::memory_order_release);
    job_number_.value.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

int64_t Pool::wait_for(Word& word, uint32_t value, int64_t awake) {
    int64_t since = 0;
    for (int i = 0;; i++) {
        const uint32_t seen = word.value.load(std::memory_order_acquire);
        if ((int32_t)(seen - value) >= 0) return since ? now() - since : 0;
        if (i < SPINS) {
            relax();
            continue;
        }
        if (!since) since = now();
        if (now() - since < awake) std::this_thread::yield();
        else word.value.wait(seen, std::memory_order_acquire);
    }
}

void Pool::barrier(int thread) {
    if (active_ == 1) return;
    const uint32_t round = arrived_[thread].value.load(std::memory_order_relaxed) + 1;
    arrived_[thread].value.store(round, std::memory_order_release);
    arrived_[thread].value.notify_all();
    for (int t = 0; t < threads_; t++)
        if (t != thread)
            arrived_[thread].waited.fetch_add(wait_for(arrived_[t], round, AWAKE),
                                             std::memory_order_relaxed);
}

int Pool::choose() {
    return active_ = now() < alone_until_ ? 1 : threads_;
}

void Pool::judge(int64_t took) {
    int64_t waited = 0;
    for (int t = 0; t < threads_; t++)
        waited = std::max(waited, arrived_[t].waited.load(std::memory_order_relaxed));
    if (2 * waited < took) {
        patience_ = late_ = 0;
        return;
    }
    if (++late_ < 2) return;
    late_ = 0;
    patience_ = std::min(std::max(2 * patience_, PATIENCE), MOST_PATIENCE);
    alone_until_ = now() + patience_;
}

void Pool::run(void (*job)(void*, int), void* context, bool bind) {
    if (active_ == 1) return job(context, 0);
    for (int t = 0; t < threads_; t++) arrived_[t].waited.store(0, std::memory_order_relaxed);
    const int64_t begun = now();
    Binding binding;
    binding.set(cpus_, 0, bind);
    job_ = job, context_ = context, bind_ = bind;
    job_number_.value.fetch_add(1, std::memory_order_release);
    job_number_.value.notify_all();
    job(context, 0);
    barrier(0);
    binding.set(cpus_, 0, false);
    judge(now() - begun);
}

void Pool::work(int thread) {
    Binding binding;
    for (uint32_t number = 1;; number++) {
        wait_for(job_number_, number, IDLE_AWAKE);
        if (!job_) return;
        binding.set(cpus_, thread, bind_);
        job_(context_, thread);
        barrier(thread);
    }
}

}  // namespace kvist
