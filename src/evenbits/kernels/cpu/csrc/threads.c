/* Threads and memory.

   torch's own OpenMP pool does the work: GOMP_parallel is found in the library torch has loaded already, so there is one
   pool and one setting (torch.set_num_threads, passed with every call). Nothing is linked and no -fopenmp is needed;
   where the symbol is absent (macOS) a call runs in one thread. Tasks are claimed from a counter, so a smaller team than
   the one asked for still does everything. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

#include "evenbits_cpu.h"

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel pool;
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;

static void find_pool(void) {
    void *symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    memcpy(&pool, &symbol, sizeof pool);
}

typedef struct {
    eb_task function;
    void *context;
    int64_t tasks, next;
} team;

static void work(void *data) {
    team *t = data;
    for (;;) {
        int64_t task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED);
        if (task >= t->tasks) return;
        t->function(t->context, task);
    }
}

void eb_parallel(eb_task function, void *context, int64_t tasks, int64_t threads) {
    team t = {function, context, tasks, 0};
    if (threads > tasks) threads = tasks;
    pthread_once(&pool_once, find_pool);
    if (threads > 1 && pool)
        pool(work, &t, (unsigned)threads, 0);
    else
        work(&t);
}

/* Whether calls can use more than one thread. */
__attribute__((visibility("default"))) int evenbits_has_threads(void) {
    pthread_once(&pool_once, find_pool);
    return pool != NULL;
}

typedef struct {
    void *start[EB_MEM_SLOTS];
    size_t bytes[EB_MEM_SLOTS];
} memory;

static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

static void release(void *data) {
    memory *m = data;
    for (int i = 0; i < EB_MEM_SLOTS; i++) free(m->start[i]);
    free(m);
}

static void make_key(void) { (void)pthread_key_create(&memory_key, release); }

/* At least `bytes` bytes, aligned to a cache line, of the calling thread; contents are not kept when it grows. Memory is
   kept between calls: fresh pages of every call would cost more than a small product. NULL if there is none. */
void *eb_memory(int slot, size_t bytes) {
    pthread_once(&memory_once, make_key);
    memory *m = pthread_getspecific(memory_key);
    if (!m) {
        m = calloc(1, sizeof *m);
        if (!m || pthread_setspecific(memory_key, m)) {
            free(m);
            return NULL;
        }
    }
    if (m->bytes[slot] < bytes) {
        free(m->start[slot]);
        m->bytes[slot] = 0;
        size_t rounded = (bytes + bytes / 8 + 4095) / 4096 * 4096;
        m->start[slot] = aligned_alloc(64, rounded);
        if (m->start[slot]) m->bytes[slot] = rounded;
    }
    return m->start[slot];
}
