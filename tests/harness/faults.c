/* A library for LD_PRELOAD that a test speaks to through a page of memory they share: it counts the calls by which a process
 * writes to its store or to a socket, and at the one that the test has chosen it ends the process, fails it, or writes half of
 * it and ends the process. It also moves the wall clock. All of it is as a kernel, a disk or a person could do it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* tests/harness/preload.rs writes the same. */
struct page {
    _Atomic int countdown; /* the fault comes at this call from now; 0: none */
    _Atomic int kind;      /* 1 end before the call, 2 fail it with EIO, 3 do half of it and end */
    _Atomic int scope;     /* 1 the store alone, 3 sockets as well */
    _Atomic int done;      /* how many faults there were */
    _Atomic long clock_ms; /* added to the wall clock */
};

static struct page *page;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("MUSTER_TEST_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *map = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED)
        page = map;
}

static int in_scope(int fd)
{
    char link[64] = "/proc/self/fd/", name[4096];
    int at = 14, digits = 1;
    for (int rest = fd; rest >= 10; rest /= 10)
        digits++;
    for (int i = digits - 1, rest = fd; i >= 0; i--, rest /= 10)
        link[at + i] = '0' + rest % 10;
    link[at + digits] = 0;
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0)
        return 0;
    name[length] = 0;
    int scope = atomic_load(&page->scope);
    return ((scope & 1) && strstr(name, "/fleet.db")) || ((scope & 2) && !strncmp(name, "socket:", 7));
}

static void die(void)
{
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
}

/* 0: go on; 2: fail; 3: do half of it and call die(). */
static int fault(int fd)
{
    if (!page || atomic_load(&page->countdown) == 0 || fd < 0)
        return 0;
    int kept = errno;
    int hit = in_scope(fd) && atomic_fetch_sub(&page->countdown, 1) == 1;
    errno = kept;
    if (!hit)
        return 0;
    atomic_fetch_add(&page->done, 1);
    int kind = atomic_load(&page->kind);
    if (kind == 1)
        die();
    return kind;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define CALL(type, name, parameters, whole, half) \
    type name parameters \
    { \
        REAL(name); \
        switch (fault(fd)) { \
        case 2: \
            errno = EIO; \
            return -1; \
        case 3: \
            half; \
            die(); \
        } \
        return whole; \
    }

#define WRITES(name, parameters, whole, half) CALL(ssize_t, name, parameters, whole, half)

WRITES(write, (int fd, const void *data, size_t size), real(fd, data, size), real(fd, data, size / 2))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), real(fd, data, size, at), real(fd, data, size / 2, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), real(fd, data, size, at), real(fd, data, size / 2, at))
WRITES(writev, (int fd, const struct iovec *parts, int count), real(fd, parts, count), real(fd, parts, 1))
WRITES(send, (int fd, const void *data, size_t size, int flags), real(fd, data, size, flags), real(fd, data, size / 2, flags))
WRITES(sendmsg, (int fd, const struct msghdr *message, int flags), real(fd, message, flags), (void)0)

/* Of a sync or a cut there is no half. */
#define SYNCS(name, parameters, whole) CALL(int, name, parameters, whole, (void)0)

SYNCS(fsync, (int fd), real(fd))
SYNCS(fdatasync, (int fd), real(fd))
SYNCS(ftruncate, (int fd, off_t size), real(fd, size))
SYNCS(ftruncate64, (int fd, off64_t size), real(fd, size))

int clock_gettime(clockid_t clock, struct timespec *time)
{
    REAL(clock_gettime);
    int done = real(clock, time);
    long ms = page && clock == CLOCK_REALTIME ? atomic_load(&page->clock_ms) : 0;
    if (done == 0 && ms != 0) {
        long long whole = time->tv_sec * 1000000000LL + time->tv_nsec + ms * 1000000LL;
        time->tv_sec = whole / 1000000000LL;
        time->tv_nsec = whole % 1000000000LL;
    }
    return done;
}
