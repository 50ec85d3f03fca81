/*
 * How far two processors are from each other: for how many nanoseconds a cache line is on its way
 * to the other one and back.
 *
 *     distance PROCESSOR PROCESSOR
 *
 * Two cores with a cache in common have it in a fifth of the time of two without. A virtual machine's
 * kernel cannot tell which of the two its processors are, and its host may move them at any time. For
 * Linux.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum {
    TRIPS = 4000,
    TIMES = 5, /* the best counts: at others something else came between */
};

static _Alignas(128) atomic_int turn;

static void stay_on(int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (pthread_setaffinity_np(pthread_self(), sizeof set, &set)) {
        fprintf(stderr, "distance: there is no processor %d for us\n", processor);
        exit(1);
    }
}

static double nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e9 + now.tv_nsec;
}

/* Takes every turn that is `mine` and gives it away, TRIPS times. */
static void play(int mine)
{
    for (int i = 0; i < TRIPS; i++) {
        while (atomic_load_explicit(&turn, memory_order_acquire) != mine)
            ;
        atomic_store_explicit(&turn, !mine, memory_order_release);
    }
}

static void *answer(void *processor)
{
    stay_on(*(int *)processor);
    for (int i = 0; i <= TIMES; i++)
        play(1);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: distance PROCESSOR PROCESSOR\n");
        return 2;
    }
    int here = atoi(argv[1]), there = atoi(argv[2]);
    pthread_t other;

    stay_on(here);
    if (pthread_create(&other, NULL, answer, &there)) {
        fprintf(stderr, "distance: no second thread\n");
        return 1;
    }
    play(0); /* until both are there */
    double least = 1e18;
    for (int i = 0; i < TIMES; i++) {
        double began = nanoseconds();
        play(0);
        double took = (nanoseconds() - began) / TRIPS;
        if (took < least)
            least = took;
    }
    printf("%.1f\n", least);
    return 0;
}
