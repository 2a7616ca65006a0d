/* Put before the C library (LD_PRELOAD), lets the storage below the directory $STORAGE do what stands in the file $STORAGE_MOOD,
   whenever something there is created, written, synced, renamed or removed:

     fast         nothing
     slow N       take N / 2 to N microseconds longer, a tenth of that for each piece that is written
     refuses N    fail with errno N
     full         take half of what is written, and then nothing; no new files
     hangs        not return before the word is another one */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Most bytes that a slow storage takes at once. */
static const size_t PIECE = 16384;

struct Mood {
    char word[16];
    long number;
};

static Mood mood(void) {
    Mood mood = {"fast", 0};
    const char *name = getenv("STORAGE_MOOD");
    long file = name ? syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0) : -1;
    if (file >= 0) {
        char text[64];
        long length = syscall(SYS_read, file, text, sizeof text - 1);
        syscall(SYS_close, file);
        text[length > 0 ? length : 0] = 0;
        sscanf(text, "%15s %ld", mood.word, &mood.number);
    }
    return mood;
}

static bool is(const Mood &mood, const char *word) {
    return !strcmp(mood.word, word);
}

static void wait_about(long microseconds) {
    static thread_local unsigned seed = (unsigned)(syscall(SYS_gettid) ^ time(NULL));
    long waits = microseconds > 1 ? microseconds - rand_r(&seed) % (microseconds / 2) : microseconds;
    timespec time = {waits / 1000000, waits % 1000000 * 1000};
    nanosleep(&time, NULL);
}

/* Whether a path that begins at a directory, or the open file itself, is on the storage. */
static bool stored(int begins, const char *path) {
    const char *storage = getenv("STORAGE");
    if (!storage)
        return false;
    int error = errno;
    char place[PATH_MAX] = "", link[64];
    if (path && path[0] == '/') {
        strncpy(place, path, sizeof place - 1);
    } else if (begins != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", begins);
        ssize_t length = readlink(link, place, sizeof place - 1);
        place[length > 0 ? length : 0] = 0;
    }
    errno = error;
    return !strncmp(place, storage, strlen(storage));
}

/* The mood of the storage once it no longer hangs, and after the time that it takes. */
static Mood patient_mood(long slower) {
    for (;;) {
        Mood now = mood();
        if (is(now, "slow"))
            wait_about(now.number / slower);
        if (!is(now, "hangs"))
            return now;
        wait_about(2000);
    }
}

static bool refused(bool needs_room) {
    Mood now = patient_mood(1);
    bool full = needs_room && is(now, "full");
    if (!full && !is(now, "refuses"))
        return false;
    errno = full ? ENOSPC : (int)now.number;
    return true;
}

/* How many of the bytes to be written are taken; 0 = none, and errno says why. */
static size_t taken(size_t length) {
    Mood now = patient_mood(10);
    if (is(now, "slow") && length > PIECE)
        return PIECE;
    if (is(now, "full") && length > 1)
        return length / 2;
    if (is(now, "full") || is(now, "refuses")) {
        errno = is(now, "full") ? ENOSPC : (int)now.number;
        return 0;
    }
    return length;
}

#define REAL(name) \
    static auto real = (decltype(&name))dlsym(RTLD_NEXT, #name)

#define OPENS(name, begins, ...) \
    { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & O_CREAT) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        bool writes = flags & (O_CREAT | O_WRONLY | O_RDWR); \
        if (writes && stored(begins, path) && refused(flags & O_CREAT)) \
            return -1; \
        return real(__VA_ARGS__, flags, mode); \
    }

#define WRITES(name, ...) \
    { \
        REAL(name); \
        if (length && stored(file, NULL) && !(length = taken(length))) \
            return -1; \
        return real(__VA_ARGS__); \
    }

#define DOES(name, is_stored, needs_room, ...) \
    { \
        REAL(name); \
        if (is_stored && refused(needs_room)) \
            return -1; \
        return real(__VA_ARGS__); \
    }

extern "C" {

int open(const char *path, int flags, ...) OPENS(open, AT_FDCWD, path)
int open64(const char *path, int flags, ...) OPENS(open64, AT_FDCWD, path)
int openat(int begins, const char *path, int flags, ...) OPENS(openat, begins, begins, path)
int openat64(int begins, const char *path, int flags, ...) OPENS(openat64, begins, begins, path)

ssize_t write(int file, const void *bytes, size_t length) WRITES(write, file, bytes, length)
ssize_t pwrite(int file, const void *bytes, size_t length, off_t from) WRITES(pwrite, file, bytes, length, from)
ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t from) WRITES(pwrite64, file, bytes, length, from)

int fsync(int file) DOES(fsync, stored(file, NULL), false, file)
int fdatasync(int file) DOES(fdatasync, stored(file, NULL), false, file)
int ftruncate(int file, off_t length) noexcept DOES(ftruncate, stored(file, NULL), true, file, length)
int ftruncate64(int file, off64_t length) noexcept DOES(ftruncate64, stored(file, NULL), true, file, length)

int mkdir(const char *path, mode_t mode) noexcept DOES(mkdir, stored(AT_FDCWD, path), true, path, mode)
int rename(const char *from, const char *to) noexcept DOES(rename, stored(AT_FDCWD, to), false, from, to)
int unlink(const char *path) noexcept DOES(unlink, stored(AT_FDCWD, path), false, path)
int unlinkat(int begins, const char *path, int flags) noexcept DOES(unlinkat, stored(begins, path), false, begins, path, flags)
int rmdir(const char *path) noexcept DOES(rmdir, stored(AT_FDCWD, path), false, path)

}
