// Parallel: one function on several threads. `each` takes those of the OpenMP library that torch has loaded, so that there
// is no second pool of threads beside torch's; without that library everything runs in the caller's thread.
// `each_of_its_own` starts threads and ends them, for long work of threads that should have no pool of OpenMP's.

#pragma once

#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <pthread.h>

#define KERNEL extern "C" __attribute__((visibility("default")))

namespace parallel {

// The entry that compilers call for `#pragma omp parallel`; libgomp and libomp have it.
using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline Entry entry() {
    static const Entry found = reinterpret_cast<Entry>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

template <class Work>
struct Turns {
    Work& work;
    const int64_t count;
    std::atomic<int64_t> next{0};

    static void run(void* self) {
        auto& turns = *static_cast<Turns*>(self);
        for (int64_t turn; (turn = turns.next.fetch_add(1, std::memory_order_relaxed)) < turns.count;) turns.work(turn);
    }
};

// work(0) ... work(count - 1), each once, on up to so many threads.
template <class Work>
void each(int64_t count, int64_t threads, Work work) {
    threads = threads < count ? threads : count;
    if (threads < 2 || entry() == nullptr) {
        for (int64_t turn = 0; turn < count; ++turn) work(turn);
        return;
    }
    Turns<Work> turns{work, count};
    entry()(Turns<Work>::run, &turns, static_cast<unsigned>(threads), 0);
}

// work(first, last) for ranges that make up `count` rows, each once, on as many threads as all rows together are worth.
template <class Work>
void ranges(int64_t count, int64_t threads, int64_t worth, Work work) {
    threads = threads < worth ? threads : worth;
    // Four for each thread, so that one that begins late keeps no other waiting for long.
    const int64_t part = threads < 2 ? count : (count + 4 * threads - 1) / (4 * threads);
    each(count == 0 ? 0 : (count + part - 1) / part, threads, [=](int64_t turn) {
        const int64_t first = turn * part;
        work(first, first + part < count ? first + part : count);
    });
}

template <class Work>
void each_of_its_own(int64_t count, int64_t threads, Work work) {
    constexpr int64_t MOST = 64;
    threads = threads < count ? threads : count;
    Turns<Work> turns{work, count};
    pthread_t started[MOST];
    int64_t running = 0;
    const auto run = [](void* self) -> void* {
        Turns<Work>::run(self);
        return nullptr;
    };
    // Whoever cannot be started leaves its turns to the others.
    while (running + 1 < threads && running < MOST && pthread_create(&started[running], nullptr, run, &turns) == 0)
        ++running;
    Turns<Work>::run(&turns);
    while (running > 0) pthread_join(started[--running], nullptr);
}

}  // namespace parallel
