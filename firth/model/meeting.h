/* A barrier of the threads of one parallel region: they spin for a moment, then offer their core to others.

   OpenMP's own barrier puts threads to sleep after a few spins once a process has more pools of threads than cores, as a server
   has, and a decoding step has hundreds of barriers: that made its steps twice as long. */

#ifndef FIRTH_MEETING_H
#define FIRTH_MEETING_H

#include <omp.h>
#include <sched.h>

#define SPINS 2000 /* 20 to 100 microseconds */

typedef struct { int arrived, phase; } Meeting;

static inline void meet(Meeting *meeting) {
    int threads = omp_get_num_threads(), phase = __atomic_load_n(&meeting->phase, __ATOMIC_RELAXED);
    if (threads == 1) return;
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&meeting->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins >= SPINS) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#endif
    }
}

#endif
