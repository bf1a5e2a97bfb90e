/* Where the threads of a parallel region wait for each other, some 70 times for a token of GPT-2.

   They wait for microseconds, so to sleep at once costs half of a token's time. OpenMP's own
   barrier does so where the process has more OpenMP threads than cores, as after one thread has
   loaded a model for another to run; otherwise GNU's barrier spins for milliseconds, which other
   programs and threads could use. This one spins at most 200 us, and less while that does not help:
   the limit doubles after a sleep that was shorter, and halves after a longer one. */

#include <stdint.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SLEEP(at, value) syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0)
#define WAKE(at) syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0)
#else
#include <sched.h>
#define SLEEP(at, value) sched_yield()
#define WAKE(at) ((void)0)
#endif

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

enum { MIN_SPINS = 64, MAX_SPINS = 8192, SHORT_NS = 200000 }; /* 8192 take about 200 us */

/* For all threads: how busy the machine is concerns them all. */
static uint32_t spin_limit = MAX_SPINS;

typedef struct { /* all zero at first */
    uint32_t round, arrived, asleep;
} barrier;

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Wait until all of `threads` threads have come here as often as this one. */
static void wait_for_all(barrier *b, int64_t threads) {
    if (threads == 1) return;
    uint32_t round = __atomic_load_n(&b->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&b->round, round + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&b->asleep, __ATOMIC_SEQ_CST)) WAKE(&b->round);
        return;
    }
    uint32_t limit = __atomic_load_n(&spin_limit, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < limit; i++) {
        if (__atomic_load_n(&b->round, __ATOMIC_ACQUIRE) != round) return;
        PAUSE();
    }
    int64_t begin = nanoseconds();
    __atomic_add_fetch(&b->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&b->round, __ATOMIC_SEQ_CST) == round) SLEEP(&b->round, round);
    __atomic_sub_fetch(&b->asleep, 1, __ATOMIC_RELAXED);
    limit = nanoseconds() - begin < SHORT_NS ? limit * 2 : limit / 2;
    limit = limit < MIN_SPINS ? MIN_SPINS : limit > MAX_SPINS ? MAX_SPINS : limit;
    __atomic_store_n(&spin_limit, limit, __ATOMIC_RELAXED);
}
