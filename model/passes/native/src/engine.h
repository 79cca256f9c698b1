// A model that is ready to run: its memory, and the program of one pass.
#pragma once
#include "api.h"
#include "attention.h"
#include "pool.h"

enum { PRIVATE_ROWS = 8 };  // up to so many rows every thread prepares inputs for itself, which saves a wait

struct Private {  // of one thread
  Input input;
  float* row;     // the widest row
  float* scores;
  float* heads;   // outputs of a group of heads, for both branches of a first-loop gate
};

enum { NO_TOKEN = -1 };  // among the logits is an infinite one or none that is a number

struct Best {
  float value;
  int32_t token;  // or NO_TOKEN
};

struct Engine {
  Model model;
  Layer* layers;
  Setup setup;
  Heads heads;
  Pool* pool;
  size_t page_bytes, slot_bytes;
  int hidden, hidden_padded, qkv_padded, attended, inner_padded, widest;
  int state_size;    // channels that a row keeps between two loops
  int block_caches;  // slots of a loop: the block's layers, the low stack's again for each further cycle
  bool heads_are_blocks;  // a head is a whole number of blocks of 16 outputs
  Private threads[MAX_THREADS];
  // of a pass, grown as needed
  int rows_capacity, readouts_capacity;
  void* memory;
  float *h, *coda_h, *sums, *qkv, *mixed, *inner;  // (rows, ...)
  Input shared;
  int32_t *entering, *ending, *all, *coda_row;  // rows by their number in the pass
  int64_t* cells;                               // (rows) where the row's state lies
  int num_entering, num_ending;
  Best* best;  // (chunks of the head, readouts)
  int head_chunks;
  const Pass* pass;
  int64_t times[NUM_PARTS];  // nanoseconds of the calling thread
};

void run_program(Worker* self, void* engine);
int head_chunk_blocks(const Engine& engine);
int block_caches(const Model& model);
size_t text_slots(const Model& model);  // those of sources are behind them
