/* Stands in for NVIDIA's NVML: the devices 0000:01:00.0 and 0000:02:00.0, whose memory $NVML_NUMBERS says.
   The calls that ask for it hang while the fifth number is not 0; the sixth counts them. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_FOUND = 6, DEVICES = 2 };

struct memory {
    unsigned long long total, free, used;
};

/* Of each device: all its memory, what is free of it. Then whether calls hang, and how many there were. */
static volatile unsigned long long *numbers;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("NVML_NUMBERS"), O_RDWR | O_CLOEXEC);
    void *mapped = mmap(NULL, (2 * DEVICES + 2) * sizeof *numbers, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        abort();
    close(fd);
    numbers = mapped;
}

int nvmlInitWithFlags(unsigned flags) {
    return flags ? NOT_FOUND : SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *address, void **device) {
    long number = strlen(address) == 12 ? strtol(address + 5, NULL, 16) : 0;
    *device = (void *)number;
    return number < 1 || number > DEVICES ? NOT_FOUND : SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    volatile unsigned long long *own = numbers + 2 * ((long)device - 1), *hangs = numbers + 2 * DEVICES;
    hangs[1]++;
    while (hangs[0])
        usleep(1000);
    memory->total = own[0];
    memory->free = own[1];
    memory->used = own[0] - own[1];
    return SUCCESS;
}
