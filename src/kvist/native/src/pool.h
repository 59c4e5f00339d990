// Threads that work in step with the caller: one job at a time, barriers inside it.
//
// Waiting spins, since phases of a step are microseconds apart, then stays awake for some milliseconds
// but lets others have the core, then sleeps on the word itself, as workers do between jobs. (A core
// that went to sleep comes back late and slow, above all in a virtual machine: prompts took a third
// longer when threads slept at once.) Where there is a thread for every core, each may be bound to its own for a job: short
// phases gain by it, and long ones lose where another program has a core.
//
// A thread whose core another program wants may come milliseconds late to every barrier, and then two
// are slower than one. So after two jobs that mostly waited (the first may have found a thread asleep)
// the caller's thread works alone for a while, and for longer each time that two were tried in vain.
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
    // Run work(thread, begin, end) on every thread's part of n equal pieces.
    template <typename Work> void divide(int64_t n, Work work) {
        struct Job {
            Pool& pool;
            int64_t n;
            Work& work;
        } job{*this, n, work};
        choose();
        run(
            [](void* context, int t) {
                const Job& job = *(const Job*)context;
                const int64_t threads = job.pool.active();
                job.work(t, job.n * t / threads, job.n * (t + 1) / threads);
            },
            &job);
    }
    // All threads have come this far, and see what the others wrote.
    void barrier(int thread);

  private:
    struct alignas(64) Word {
        std::atomic<uint32_t> value{0};
        std::atomic<int64_t> waited{0};  // nanoseconds in this job, by the thread whose word it is
    };

    // Awake for some nanoseconds, then asleep. Returns nanoseconds waited, but for short waits 0.
    static int64_t wait_for(Word& word, uint32_t value, int64_t awake);
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
    // Nanoseconds: until when the caller's thread works alone, and for how long it was the last time.
    int64_t alone_until_ = 0, patience_ = 0;
    int late_ = 0;  // jobs in a row that mostly waited
    std::vector<std::thread> workers_;
};

}  // namespace kvist
