/* Counts what torch's CPU allocator hands out, to the byte, and refuses past a limit. Preload it:
 *
 *     cc -O2 -shared -fPIC -o counter.so memory_prediction.c -ldl
 *     LD_PRELOAD=./counter.so python script.py
 *
 * torch allocates tensors with posix_memalign, called from libc10.so; kernel libraries call it too, for scratch
 * space that is no tensor, and are not counted. Python reads and sets the counters through ctypes.CDLL(None).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SLOTS (1u << 20) /* live allocations that can be told apart */
#define CALLERS 64

static int (*real_posix_memalign)(void **, size_t, size_t);
static void (*real_free)(void *);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uintptr_t keys[SLOTS]; /* 0 empty, 1 deleted */
static size_t sizes[SLOTS];
static size_t live, peak, limit = SIZE_MAX, refused;
static struct { void *address; int counted; } callers[CALLERS];
static int caller_count;

static uint32_t slot_of(uintptr_t key) { return (uint32_t)((key >> 6) * 2654435761u) & (SLOTS - 1); }

static int counted_caller(void *address) {
    for (int i = 0; i < caller_count; i++)
        if (callers[i].address == address) return callers[i].counted;
    Dl_info info;
    int counted = dladdr(address, &info) && info.dli_fname && strstr(info.dli_fname, "libc10.so") != NULL;
    if (caller_count < CALLERS) {
        callers[caller_count].address = address;
        callers[caller_count++].counted = counted;
    }
    return counted;
}

static void enter(uintptr_t key, size_t size) {
    uint32_t at = slot_of(key);
    while (keys[at] > 1) at = (at + 1) & (SLOTS - 1);
    keys[at] = key;
    sizes[at] = size;
    live += size;
    if (live > peak) peak = live;
}

static void leave(uintptr_t key) {
    for (uint32_t at = slot_of(key), tried = 0; keys[at] != 0 && tried < SLOTS; at = (at + 1) & (SLOTS - 1), tried++) {
        if (keys[at] != key) continue;
        keys[at] = keys[(at + 1) & (SLOTS - 1)] == 0 ? 0 : 1;
        live -= sizes[at];
        return;
    }
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    if (!real_posix_memalign) real_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    pthread_mutex_lock(&lock);
    int counted = counted_caller(__builtin_return_address(0));
    int status;
    if (counted && (size > limit || live > limit - size)) {
        refused++;
        status = ENOMEM;
    } else {
        status = real_posix_memalign(out, alignment, size);
        if (counted && status == 0) enter((uintptr_t)*out, size);
    }
    pthread_mutex_unlock(&lock);
    return status;
}

void free(void *pointer) {
    if (!real_free) real_free = dlsym(RTLD_NEXT, "free");
    if (pointer && ((uintptr_t)pointer & 63) == 0) {
        pthread_mutex_lock(&lock);
        leave((uintptr_t)pointer);
        pthread_mutex_unlock(&lock);
    }
    real_free(pointer);
}

size_t counter_live(void) { return live; }
size_t counter_peak(void) { return peak; }
size_t counter_refused(void) { return refused; }
void counter_reset_peak(void) { pthread_mutex_lock(&lock); peak = live; refused = 0; pthread_mutex_unlock(&lock); }
void counter_limit(size_t bytes) { limit = bytes ? bytes : SIZE_MAX; }
