// Threads that work in step with the caller: one job at a time, barriers inside it.
//
// Waiting spins briefly, since phases of a step are microseconds apart, then sleeps on the word
// itself, so that a thread whose neighbour was descheduled gives its core up. Between jobs the
// workers sleep. Where there is a thread for every core, each may be bound to its own for a job: short
// phases gain by it, and long ones lose where another program has a core.
//
// A thread whose core another program wants may come milliseconds late to every barrier, and then two
// are slower than one. So a job that mostly slept is followed by some on the caller's thread alone, and
// by more each time that two were tried again in vain.
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
    // Threads of the job under way: all, or the caller's alone.
    int active() const { return active_; }
    // How many threads the next job has; called before `run` by who divides the work.
    int choose();
    // Run job(context, t) on every thread t < active(); the caller is thread 0.
    void run(void (*job)(void*, int), void* context, bool bind = false);
    // All threads have come this far, and see what the others wrote.
    void barrier(int thread);

  private:
    struct alignas(64) Word {
        std::atomic<uint32_t> value{0};
        std::atomic<int64_t> slept{0};  // nanoseconds in this job, by the thread whose word it is
    };

    // Returns nanoseconds slept.
    static int64_t wait_for(Word& word, uint32_t value, int spins);
    void work(int thread);
    void judge(int64_t took);

    const int threads_;
    const std::vector<int> cpus_;
    std::unique_ptr<Word[]> arrived_;
    Word job_number_;
    void (*job_)(void*, int) = nullptr;  // null ends the workers
    void* context_ = nullptr;
    bool bind_ = false;
    int active_;
    int alone_ = 0, patience_ = 0;  // jobs to come on one thread, and how many it was the last time
    std::vector<std::thread> workers_;
};

}  // namespace kvist
