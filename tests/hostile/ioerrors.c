/* Fails calls on files under $FAULTS_UNDER with EIO, as often as the numbers in the file $FAULTS say. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

enum { READS, WRITES, SYNCS, FAILED, NUMBERS };

static volatile unsigned *numbers;
static const char *under;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("FAULTS"), O_RDWR | O_CLOEXEC);
    void *mapped = mmap(NULL, NUMBERS * sizeof *numbers, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        abort();
    close(fd);
    under = getenv("FAULTS_UNDER");
    numbers = mapped;
}

static int fails(int fd, int kind) {
    char name[32], path[4096];
    ssize_t length;
    if (!numbers || !numbers[kind] || random() % 1000 >= numbers[kind])
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    length = readlink(name, path, sizeof path);
    if (length < (ssize_t)strlen(under) || strncmp(path, under, strlen(under)))
        return 0;
    __atomic_add_fetch(&numbers[FAILED], 1, __ATOMIC_RELAXED);
    errno = EIO;
    return 1;
}

#define WRAP(kind, type, name, parameters, ...)                                                              \
    type name parameters {                                                                                   \
        static type(*real) parameters;                                                                       \
        if (!real)                                                                                           \
            real = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                              \
        return fails(fd, kind) ? -1 : real(__VA_ARGS__);                                                     \
    }

WRAP(READS, ssize_t, read, (int fd, void *data, size_t count), fd, data, count)
WRAP(READS, ssize_t, pread, (int fd, void *data, size_t count, off_t at), fd, data, count, at)
WRAP(READS, ssize_t, pread64, (int fd, void *data, size_t count, off64_t at), fd, data, count, at)
WRAP(WRITES, ssize_t, write, (int fd, const void *data, size_t count), fd, data, count)
WRAP(WRITES, ssize_t, pwrite, (int fd, const void *data, size_t count, off_t at), fd, data, count, at)
WRAP(WRITES, ssize_t, pwrite64, (int fd, const void *data, size_t count, off64_t at), fd, data, count, at)
WRAP(WRITES, ssize_t, copy_file_range, (int from, off64_t *begin, int fd, off64_t *at, size_t count, unsigned flags), from, begin, fd, at, count, flags)
WRAP(WRITES, int, ftruncate, (int fd, off_t size), fd, size)
WRAP(WRITES, int, ftruncate64, (int fd, off64_t size), fd, size)
WRAP(SYNCS, int, fsync, (int fd), fd)
WRAP(SYNCS, int, fdatasync, (int fd), fd)
