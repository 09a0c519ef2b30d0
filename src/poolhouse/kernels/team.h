// Team: threads that may help with one piece of work at a time, and that nobody waits for until they have begun.
//
// At a barrier of OpenMP every thread waits for every other. Where neighbours keep the cores busy, a thread that was not
// given a core yet costs a time slice, dozens of times per query. Here the leader offers turns; whoever is awake takes the
// next one, and the leader waits only for turns that a helper has taken. A helper that lost its core in the middle of one
// makes the team rest: the leader goes on alone, and tries again after 0.2 seconds, or longer each time that it was in
// vain.
//
//     leader   offer(phase) -> takes turns until none is left -> waits for those that helpers took -> the next phase
//     helper   sleeps -> woken once per piece of work -> takes turns, spins for a moment between phases -> sleeps at its end

#pragma once

#include <atomic>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace team {

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

constexpr int MOST_HELPERS = 3;
// A helper sleeps when it had nothing to do for so long.
constexpr int64_t IDLE = 60000;
// A turn takes some ten microseconds. Who does not end it in this time has lost its core.
constexpr int64_t LATE = 250000;
constexpr int64_t SHORTEST_REST = 200000000, LONGEST_REST = 64 * SHORTEST_REST;

struct Team {
    // The phase that is offered: how many turns << 16 | the next one.
    alignas(64) std::atomic<uint64_t> offered{0};
    // Turns of this phase that helpers have ended.
    alignas(64) std::atomic<uint32_t> ended{0};
    // Counts pieces of work; helpers sleep on it.
    alignas(64) std::atomic<uint32_t> pieces{0};
    std::atomic<uint32_t> asleep{0};
    std::atomic<int> begun{0};
    // What a turn is: written before the phase is offered, which ends only when all of its turns have.
    void (*turn)(void*, int64_t, int) = nullptr;
    void* work = nullptr;
    std::atomic<bool> led{false};
    pid_t process = 0;
    // Of the leader alone.
    int made = 0;
    int64_t resting_until = 0, rest = SHORTEST_REST;

    // Make helpers, up to so many. They get no signals of this process.
    void begin(int helpers) {
        while (made < helpers) {
            sigset_t all, before;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            pthread_t thread;
            const bool is_made = pthread_create(&thread, nullptr, help, this) == 0;
            if (is_made) pthread_detach(thread);
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (!is_made) return;
            ++made;
        }
    }

    bool take(int who) {
        const uint64_t seen = offered.load(std::memory_order_acquire);
        if ((seen & 0xffff) >= (seen >> 16 & 0xffff)) return false;
        const uint64_t taken = offered.fetch_add(1, std::memory_order_acq_rel);
        const uint64_t number = taken & 0xffff;
        if (number >= (taken >> 16 & 0xffff)) return false;
        turn(work, int64_t(number), who);
        return true;
    }

    static void* help(void* self) {
        auto& team = *static_cast<Team*>(self);
        const int who = team.begun.fetch_add(1) + 1;
        while (true) {
            const uint32_t piece = team.pieces.load(std::memory_order_acquire);
            int64_t since = nanoseconds();
            while (true) {
                if (team.take(who)) {
                    team.ended.fetch_add(1, std::memory_order_release);
                    since = nanoseconds();
                    continue;
                }
                for (int i = 0; i < 16; ++i) _mm_pause();
                // Not beyond the end of the work: the core is for whoever reads the answer.
                if (!team.led.load(std::memory_order_acquire) || nanoseconds() - since > IDLE) break;
            }
            team.asleep.fetch_add(1);
            syscall(SYS_futex, &team.pieces, FUTEX_WAIT_PRIVATE, piece, nullptr, nullptr, 0);
            team.asleep.fetch_sub(1);
        }
        return nullptr;
    }
};

// A child of a fork has none of the threads, and begins anew. What was there is not freed: a helper may have held it.
inline Team* of_this_process() {
    static std::atomic<Team*> current{nullptr};
    Team* team = current.load(std::memory_order_acquire);
    const pid_t process = getpid();
    if (team != nullptr && team->process == process) return team;
    auto* own = new Team;
    own->process = process;
    if (current.compare_exchange_strong(team, own)) return own;
    delete own;
    return current.load(std::memory_order_acquire);
}

// The one that leads a piece of work. Without helpers, because another thread leads or the team rests, it does all itself.
class Leader {
    Team* team = nullptr;
    bool late = false, helped = false;

    template <class Work>
    static void turn(void* work, int64_t number, int who) {
        (*static_cast<Work*>(work))(number, who);
    }

  public:
    explicit Leader(int64_t helpers) {
        if (helpers < 1) return;
        Team* found = of_this_process();
        if (found->led.exchange(true, std::memory_order_acquire)) return;
        found->begin(helpers < MOST_HELPERS ? int(helpers) : MOST_HELPERS);
        if (found->made == 0 || nanoseconds() < found->resting_until) {
            found->led.store(false, std::memory_order_release);
            return;
        }
        team = found;
        team->pieces.fetch_add(1);
        if (team->asleep.load() > 0) syscall(SYS_futex, &team->pieces, FUTEX_WAKE_PRIVATE, MOST_HELPERS, nullptr, nullptr, 0);
    }

    ~Leader() {
        if (team == nullptr) return;
        if (late) {
            team->resting_until = nanoseconds() + team->rest;
            team->rest = team->rest < LONGEST_REST ? 2 * team->rest : LONGEST_REST;
        } else if (helped) {
            team->rest = team->rest / 2 > SHORTEST_REST ? team->rest / 2 : SHORTEST_REST;
        }
        team->led.store(false, std::memory_order_release);
    }

    Leader(const Leader&) = delete;
    Leader& operator=(const Leader&) = delete;

    // work(number, who) for each number below `count`, at most 65535; who: 0 for the leader, then the helpers.
    template <class Work>
    void each(int64_t count, Work work) {
        if (team == nullptr || late || count < 2) {
            for (int64_t number = 0; number < count; ++number) work(number, 0);
            return;
        }
        team->turn = turn<Work>;
        team->work = &work;
        team->ended.store(0, std::memory_order_relaxed);
        const int64_t began = nanoseconds();
        team->offered.store(uint64_t(count) << 16, std::memory_order_release);
        uint32_t own = 0;
        while (team->take(0)) ++own;
        const uint32_t theirs = uint32_t(count) - own;
        if (theirs == 0) return;
        helped = true;
        const int64_t done = nanoseconds(), longest = LATE + (own == 0 ? 0 : 4 * (done - began) / own);
        while (team->ended.load(std::memory_order_acquire) != theirs) {
            for (int i = 0; i < 8; ++i) _mm_pause();
            if (late) sched_yield();
            else late = nanoseconds() - done > longest;
        }
    }
};

}  // namespace team
