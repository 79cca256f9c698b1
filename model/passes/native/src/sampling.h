// From logits to tokens: penalties, bias, filters and Gumbel noise; and what logits say of a token.
//
// Token t of position p is the argmax of filter(logits) / T + G(seed, p, t). Every row is worked on by one thread
// and alone, so what is chosen depends on nothing else. Structures are as in structs.py; pointers stay the caller's.
#pragma once
#include <stdint.h>

struct Engine;

struct Choice {  // how one token is chosen
  uint64_t seed;
  int64_t position;           // of the token
  float temperature;          // 0: the likeliest token
  float top_p, min_p;         // 1 and 0 keep all
  int32_t top_k;              // 0 keeps all
  float repetition, frequency, presence;
  int32_t num_counted, num_biased, num_banned;
  const int32_t* counted;     // the text's distinct tokens
  const int32_t* outputs;     // how often each of them stands in what was generated
  const int32_t* biased;
  const float* biases;
  const int32_t* banned;
  const uint8_t* forbidden;   // (vocab_size), or NULL
};

struct Choosing {
  int32_t num_rows, num_logits;
  const float* logits;    // (num_logits, vocab_size)
  const int32_t* rows;    // (num_rows) of logits
  const Choice* choices;  // (num_rows)
  int32_t* tokens;        // (num_rows) what is chosen
  float* scratch;         // speed_scratch_bytes
};

struct Scoring {
  int32_t num_rows, num_logits, num_top, unused;
  const float* logits;
  const int32_t* rows;
  const int32_t* tokens;  // (num_rows) whose scores are asked for
  float* logprobs;        // (num_rows)
  int32_t* ranks;         // (num_rows) 1 + the number of likelier tokens
  int32_t* top_tokens;    // (num_rows, num_top) the likeliest, first of all the smallest number
  float* top_logprobs;    // (num_rows, num_top)
};

#pragma GCC visibility push(default)
extern "C" {
// sizeof Choice, Choosing and Scoring.
void speed_sampling_sizes(int32_t sizes[3]);
uint64_t speed_scratch_bytes(const Engine* engine);
// 0, or 1 and why in `error`; then nothing has been chosen or scored.
int32_t speed_choose(Engine* engine, const Choosing* work, char* error, int32_t error_bytes);
int32_t speed_score(Engine* engine, const Scoring* work, char* error, int32_t error_bytes);
}
#pragma GCC visibility pop
