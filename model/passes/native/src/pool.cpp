#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vec.h"

namespace {

struct alignas(128) Share {
  uint64_t word;  // stage (32 bits), next chunk from the front (16), end (16)
};

struct alignas(128) Count {
  uint64_t word;  // stage (32 bits), chunks done (32)
};

// A word that sleepers wait on; `turn` changes whenever they might have something to do.
struct alignas(128) Bell {
  uint32_t turn;
  uint32_t sleepers;
};

constexpr uint64_t OPEN = 1u << 16;  // of the gate: threads may join; below it the number that have

INLINE uint64_t get(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

INLINE bool exchange(uint64_t* word, uint64_t* seen, uint64_t wanted) {
  return __atomic_compare_exchange_n(word, seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}

INLINE int32_t age(uint64_t word, uint32_t stage) { return (int32_t)((uint32_t)(word >> 32) - stage); }

INLINE void pause_once() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void ring(Bell* bell) {
  __atomic_add_fetch(&bell->turn, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST)) {
    syscall(SYS_futex, &bell->turn, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
  }
}

template <class Ready>
void wait_for(Bell* bell, int64_t spin_nanoseconds, Ready ready) {
  int64_t until = 0;
  for (uint32_t turn = 1; !ready(); turn++) {
    pause_once();
    if (turn % 64) continue;
    int64_t now = nanoseconds();
    if (!until) {
      until = now + spin_nanoseconds;
    } else if (now > until) {
      break;
    }
  }
  while (!ready()) {
    __atomic_add_fetch(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(&bell->turn, __ATOMIC_SEQ_CST);
    if (!ready()) syscall(SYS_futex, &bell->turn, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    __atomic_sub_fetch(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
  }
}

}  // namespace

struct Pool {
  Share shares[MAX_THREADS];
  Count done;
  Bell stage_bell, pass_bell;
  alignas(128) uint64_t gate;  // pass (32 bits), OPEN, threads inside beside the caller
  uint32_t closing;
  int num_threads;
  int64_t spin_nanoseconds;
  Program program;
  void* context;
  uint32_t stage;  // that the pass begins at
  Worker workers[MAX_THREADS];
  pthread_t threads[MAX_THREADS];
};

int pool_threads(const Pool* pool) { return pool->num_threads; }

bool stage_begin(Worker* self) {
  self->stage++;
  return age(get(&self->pool->done.word), self->stage) <= 0;
}

static int take(uint64_t* word, uint32_t stage, uint32_t first, uint32_t last, bool front) {
  uint64_t seen = get(word);
  for (;;) {
    int32_t old = age(seen, stage);
    if (old > 0) return -1;
    uint32_t begin = old < 0 ? first : (uint32_t)(seen >> 16) & 0xffff, end = old < 0 ? last : (uint32_t)seen & 0xffff;
    if (begin >= end) return -1;
    int chunk = front ? (int)begin++ : (int)--end;
    if (exchange(word, &seen, (uint64_t)stage << 32 | (uint64_t)begin << 16 | end)) return chunk;
  }
}

int stage_take(Worker* self, int chunks) {
  Pool* pool = self->pool;
  int threads = pool->num_threads;
  for (int step = 0; step < threads; step++) {
    int owner = self->index + step;
    if (owner >= threads) owner -= threads;
    uint32_t first = (uint32_t)(chunks * owner / threads), last = (uint32_t)(chunks * (owner + 1) / threads);
    int chunk = take(&pool->shares[owner].word, self->stage, first, last, step == 0);
    if (chunk >= 0) return chunk;
  }
  return -1;
}

void stage_end(Worker* self, int count, int chunks) {
  Pool* pool = self->pool;
  uint64_t* word = &pool->done.word;
  uint64_t seen = get(word);
  bool last = chunks == 0;
  while (count) {
    uint32_t already = age(seen, self->stage) < 0 ? 0 : (uint32_t)seen;
    uint32_t now = already + (uint32_t)count;
    if (exchange(word, &seen, (uint64_t)self->stage << 32 | now)) {
      last = now == (uint32_t)chunks;
      break;
    }
  }
  if (last) {
    if (pool->num_threads > 1) ring(&pool->stage_bell);
    return;
  }
  wait_for(&pool->stage_bell, pool->spin_nanoseconds, [=] {
    uint64_t now = get(word);
    int32_t old = age(now, self->stage);
    return old > 0 || (old == 0 && (uint32_t)now == (uint32_t)chunks);
  });
}

static bool join(Pool* pool, uint32_t pass) {
  uint64_t seen = get(&pool->gate);
  while ((uint32_t)(seen >> 32) == pass && seen & OPEN) {
    if (exchange(&pool->gate, &seen, seen + 1)) return true;
  }
  return false;
}

static void* work(void* argument) {
  Worker* self = (Worker*)argument;
  Pool* pool = self->pool;
  uint32_t pass = 0;
  for (;;) {
    wait_for(&pool->pass_bell, pool->spin_nanoseconds, [=] {
      return (uint32_t)(get(&pool->gate) >> 32) != pass || __atomic_load_n(&pool->closing, __ATOMIC_ACQUIRE);
    });
    if (__atomic_load_n(&pool->closing, __ATOMIC_ACQUIRE)) return nullptr;
    pass = (uint32_t)(get(&pool->gate) >> 32);
    if (!join(pool, pass)) continue;
    self->stage = pool->stage;
    pool->program(self, pool->context);
    __atomic_sub_fetch(&pool->gate, 1, __ATOMIC_SEQ_CST);
    ring(&pool->stage_bell);
  }
}

void pool_run(Pool* pool, Program program, void* context) {
  Worker* self = &pool->workers[0];
  pool->program = program;
  pool->context = context;
  pool->stage = self->stage;
  uint64_t pass = (get(&pool->gate) >> 32) + 1;
  __atomic_store_n(&pool->gate, pass << 32 | OPEN, __ATOMIC_SEQ_CST);
  if (pool->num_threads > 1) ring(&pool->pass_bell);
  program(self, context);
  __atomic_and_fetch(&pool->gate, ~OPEN, __ATOMIC_SEQ_CST);
  wait_for(&pool->stage_bell, pool->spin_nanoseconds, [=] { return (get(&pool->gate) & 0xffff) == 0; });
}

Pool* pool_open(int num_threads, int spin_microseconds) {
  void* memory = nullptr;
  if (num_threads < 1 || num_threads > MAX_THREADS || posix_memalign(&memory, 128, sizeof(Pool))) return nullptr;
  Pool* pool = (Pool*)memory;
  memset(pool, 0, sizeof *pool);
  pool->spin_nanoseconds = (int64_t)spin_microseconds * 1000;
  pool->num_threads = num_threads;
  for (int i = 0; i < num_threads; i++) pool->workers[i] = {pool, i, 0};
  for (int i = 1; i < num_threads; i++) {
    if (pthread_create(&pool->threads[i], nullptr, work, &pool->workers[i])) {
      pool->num_threads = i;
      pool_close(pool);
      return nullptr;
    }
  }
  return pool;
}

void pool_close(Pool* pool) {
  __atomic_store_n(&pool->closing, 1, __ATOMIC_SEQ_CST);
  ring(&pool->pass_bell);
  for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], nullptr);
  free(pool);
}
