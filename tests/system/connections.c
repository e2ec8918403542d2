/* Counts connections over IP, and look-ups of names, in the file $CONNECTIONS; stderr says which. A process that can
   open no files has the counters from the one that forked it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTIONS, LOOKUPS, NUMBERS };

static unsigned *numbers;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("CONNECTIONS"), O_RDWR | O_CLOEXEC);
    void *mapped = mmap(NULL, NUMBERS * sizeof *numbers, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        abort();
    close(fd);
    numbers = mapped;
}

static void count(int kind, const char *what) {
    __atomic_add_fetch(&numbers[kind], 1, __ATOMIC_RELAXED);
    dprintf(STDERR_FILENO, "%s %s\n", kind == CONNECTIONS ? "connects to" : "looks up", what);
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    static int (*real)(int, const struct sockaddr *, socklen_t);
    char host[INET6_ADDRSTRLEN] = "?";
    if (!real)
        real = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect");
    if (address->sa_family == AF_INET || address->sa_family == AF_INET6) {
        getnameinfo(address, length, host, sizeof host, NULL, 0, NI_NUMERICHOST);
        count(CONNECTIONS, host);
    }
    return real(fd, address, length);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    static int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    unsigned char address[sizeof(struct in6_addr)];
    if (!real)
        real = (int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(
            RTLD_NEXT, "getaddrinfo");
    if (name && !inet_pton(AF_INET, name, address) && !inet_pton(AF_INET6, name, address))
        count(LOOKUPS, name);
    return real(name, service, hints, found);
}
