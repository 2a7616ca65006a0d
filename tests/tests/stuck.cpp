/* Put before the C library (LD_PRELOAD), lets the main thread of the process whose id stands in the file $STANDS_STILL
   stand still for ever when it next looks at a clock. Its other threads go on. */

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static bool named(void) {
    int error = errno;
    const char *name = getenv("STANDS_STILL");
    FILE *file = name ? fopen(name, "r") : NULL;
    long process = 0;
    if (file) {
        if (fscanf(file, "%ld", &process) != 1)
            process = 0;
        fclose(file);
    }
    errno = error;
    return process == getpid();
}

extern "C" int clock_gettime(clockid_t clock, struct timespec *now) noexcept {
    typedef int (*Real)(clockid_t, struct timespec *);
    static Real real = (Real)dlsym(RTLD_NEXT, "clock_gettime");
    while (syscall(SYS_gettid) == getpid() && named())
        pause();
    return real(clock, now);
}
