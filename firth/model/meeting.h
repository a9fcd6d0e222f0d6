/* A barrier of the threads of one parallel region: they spin for a moment, then sleep.

   OpenMP's own barrier reduces the spins to a hundred once a process has more threads in its pools than there are cores, as a
   server has. A decoding step has hundreds of barriers, so most of them put a thread to sleep and steps took twice as long.
   Threads that only spin would take the core from the thread that they wait for. */

#ifndef FIRTH_MEETING_H
#define FIRTH_MEETING_H

#include <omp.h>
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define SPINS 5000 /* as `firth.openmp.GOMP_SPINS`: 50 to 250 microseconds */

typedef struct { int arrived, phase, sleepers; } Meeting;

static inline void meet(Meeting *meeting) {
    int threads = omp_get_num_threads(), phase = __atomic_load_n(&meeting->phase, __ATOMIC_RELAXED);
    if (threads == 1) return;
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->phase, phase + 1, __ATOMIC_SEQ_CST);
#ifdef __linux__
        if (__atomic_load_n(&meeting->sleepers, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &meeting->phase, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
#endif
        return;
    }
    for (int spins = 0; __atomic_load_n(&meeting->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins < SPINS) {
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
            continue;
        }
#ifdef __linux__ /* the kernel lets a thread sleep only if the phase is still this one */
        __atomic_add_fetch(&meeting->sleepers, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &meeting->phase, FUTEX_WAIT_PRIVATE, phase, 0, 0, 0);
        __atomic_sub_fetch(&meeting->sleepers, 1, __ATOMIC_SEQ_CST);
#else
        sched_yield();
#endif
    }
}

#endif
