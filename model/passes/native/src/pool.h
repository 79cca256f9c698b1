// Threads that run one program side by side, stage by stage.
//
// Every thread walks through the same stages. A stage is a number of chunks; each thread takes chunks of its own
// share from the front and then of the others' from the back. A stage ends when its chunks are done, not when
// all threads have arrived: one that the system has put aside finds the stage over and catches up. Waiting
// spins for a while and then sleeps, because a thread that spins for ever takes the core from those with work.
#pragma once
#include <stdint.h>
#include <time.h>

enum { MAX_THREADS = 64, MAX_CHUNKS = 65535 };

struct Pool;
struct Worker {
  Pool* pool;
  int index;
  uint32_t stage;  // the number of the stage that it is in
};

typedef void (*Program)(Worker* self, void* context);

// NULL when memory or threads are not to be had. One of `num_threads` is the caller of pool_run.
Pool* pool_open(int num_threads, int spin_microseconds);
void pool_close(Pool* pool);
int pool_threads(const Pool* pool);
// Runs `program` on all threads; returns when no thread is in it any more.
void pool_run(Pool* pool, Program program, void* context);

static inline int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

// The next stage begins; false if it is over already.
bool stage_begin(Worker* self);
// A chunk of this stage that nobody has taken, or -1.
int stage_take(Worker* self, int chunks);
// Reports `count` chunks as done and waits until all `chunks` are.
void stage_end(Worker* self, int count, int chunks);

// One stage. `prepare` runs on every thread that is in time and may only write what is its own; `work` is
// called once for each chunk, by any thread.
template <class Prepare, class Work>
static inline void run_stage(Worker* self, int chunks, Prepare prepare, Work work) {
  if (!stage_begin(self)) return;
  prepare();
  int done = 0;
  for (int chunk; (chunk = stage_take(self, chunks)) >= 0; done++) work(chunk);
  stage_end(self, done, chunks);
}

template <class Work>
static inline void run_stage(Worker* self, int chunks, Work work) {
  run_stage(self, chunks, [] {}, work);
}
