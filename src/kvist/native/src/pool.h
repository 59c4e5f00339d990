// Threads that work in step with the caller: one job at a time, barriers inside it.
//
// Waiting spins briefly, since phases of a step are microseconds apart, then sleeps on the word
// itself, so that a thread whose neighbour was descheduled gives its core up. Between jobs the
// workers sleep. Where there is a thread for every core, each may be bound to its own for a job: short
// phases gain by it, and long ones lose where another program has a core.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace kvist {

class Pool {
  public:
    // `cpus`: one for each thread, or empty to let the system place them.
    Pool(int threads, std::vector<int> cpus);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Run job(context, t) on every thread t; the caller is thread 0.
    void run(void (*job)(void*, int), void* context, bool bind = false);
    // All threads have come this far, and see what the others wrote.
    void barrier(int thread);

  private:
    struct alignas(64) Word {
        std::atomic<uint32_t> value{0};
    };

    static void wait_for(Word& word, uint32_t value, int spins);
    void work(int thread);

    const int threads_;
    const std::vector<int> cpus_;
    std::unique_ptr<Word[]> arrived_;
    Word job_number_;
    void (*job_)(void*, int) = nullptr;  // null ends the workers
    void* context_ = nullptr;
    bool bind_ = false;
    std::vector<std::thread> workers_;
};

}  // namespace kvist
