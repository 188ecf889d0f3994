/* An exact budget for torch's CPU allocator, preloaded into a child: posix_memalign refuses what would go past it.
 *
 * Counting begins with budget_begin(bytes) and covers blocks allocated from then on; only their requested sizes count.
 * torch takes all tensor memory from posix_memalign and gives it back to free.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define SLOTS (1u << 20)
#define TOMBSTONE ((void *)1)

static int (*next_memalign)(void **, size_t, size_t);
static void (*next_free)(void *);
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static void *blocks[SLOTS];
static size_t sizes[SLOTS];
static size_t budget, used, peak, tracked;
static long refused;
static volatile int counting;

static size_t slot_of(void *block) { return (((uintptr_t)block >> 6) * 11400714819323198485ull) >> 44; }

static void remember(void *block, size_t size) {
    size_t at = slot_of(block);
    while (blocks[at] && blocks[at] != TOMBSTONE) at = (at + 1) % SLOTS;
    blocks[at] = block;
    sizes[at] = size;
    tracked++;
    used += size;
    if (used > peak) peak = used;
}

static void forget(void *block) {
    size_t at = slot_of(block);
    for (size_t tries = 0; blocks[at] && tries < SLOTS; tries++, at = (at + 1) % SLOTS)
        if (blocks[at] == block) {
            blocks[at] = TOMBSTONE;
            used -= sizes[at];
            tracked--;
            return;
        }
}

int posix_memalign(void **result, size_t alignment, size_t size) {
    if (!next_memalign) next_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    if (!counting) return next_memalign(result, alignment, size);
    pthread_mutex_lock(&guard);
    int status = ENOMEM;
    if (budget && used + size > budget)
        refused++;
    else if ((status = next_memalign(result, alignment, size)) == 0)
        remember(*result, size);
    pthread_mutex_unlock(&guard);
    return status;
}

void free(void *block) {
    if (!next_free) next_free = dlsym(RTLD_NEXT, "free");
    if (block && tracked) {
        pthread_mutex_lock(&guard);
        forget(block);
        pthread_mutex_unlock(&guard);
    }
    next_free(block);
}

/* Starts anew; 0 bytes: without a limit. */
void budget_begin(size_t bytes) {
    pthread_mutex_lock(&guard);
    for (size_t at = 0; at < SLOTS; at++) blocks[at] = NULL;
    used = peak = tracked = 0;
    refused = 0;
    budget = bytes;
    counting = 1;
    pthread_mutex_unlock(&guard);
}

size_t budget_peak(void) { return peak; }
long budget_refused(void) { return refused; }
