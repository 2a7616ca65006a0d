/* Put before the C library (LD_PRELOAD), moves the wall clock of a program by the seconds in $STEPPED_CLOCK. */

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long step(void) {
    int error = errno;
    const char *name = getenv("STEPPED_CLOCK");
    FILE *file = name ? fopen(name, "r") : NULL;
    long seconds = 0;
    if (file) {
        if (fscanf(file, "%ld", &seconds) != 1)
            seconds = 0;
        fclose(file);
    }
    errno = error;
    return seconds;
}

/* Monotonic clocks are left alone, as they are when an administrator or NTP sets the time. */
extern "C" int clock_gettime(clockid_t clock, struct timespec *now) noexcept {
    typedef int (*Real)(clockid_t, struct timespec *);
    static Real real = (Real)dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += step();
    return result;
}

extern "C" int gettimeofday(struct timeval *now, void *zone) noexcept {
    typedef int (*Real)(struct timeval *, void *);
    static Real real = (Real)dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(now, zone);
    if (result == 0)
        now->tv_sec += step();
    return result;
}

extern "C" time_t time(time_t *out) noexcept {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
