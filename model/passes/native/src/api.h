// What Python calls and hands over; `structs.py` has the same structures. All pointers stay the caller's.
#pragma once
#include "products.h"

enum { INTERFACE = 7 };  // changes with any of the structures below
enum { MOST_ROWS = 1 << 18 };  // of a pass: times 4096 heads they are still counted in 31 bits

// INTERPOLATION: norms give unit length and have no weights, and states step towards normalised outputs.
enum Placement { PRE, SANDWICH, POST_ADD, OUTPUT, INTERPOLATION };
enum Start { FROM_NOISE, FROM_INPUT, FROM_INPUT_ALONE };

struct Layer {
  Matrix qkv, o, gate_up, down;  // gate_up: blocks of 16 gates and 16 ups in turn, or ups alone with plain_mlp
  Matrix source_q, source_k, source_v, source_o;  // of the block's layers behind an encoder
  const float *attn_norm, *mlp_norm, *attn_out_norm, *mlp_out_norm, *attn_sum_norm, *mlp_sum_norm, *source_norm;
  const float *q_norm, *k_norm, *qk_bias;
  const float *loop_gate_weight, *loop_gate_bias;
  // With INTERPOLATION, as they are multiplied: of queries, of the output gate's logits (heads * head_dim each),
  // of the MLP's gates and ups (intermediate_size, padded to 16), of steps after attention and MLP (hidden_size).
  const float *query_scale, *gate_scale, *mlp_gate_scale, *mlp_up_scale, *attn_rate, *mlp_rate;
  int32_t windowed, second_rope;
};

struct Model {
  int32_t vocab_size, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, rotary_dim, max_positions;
  int32_t num_prelude_layers, num_block_layers, num_coda_layers, num_loops;
  int32_t placement, norm_after_loop, norm_before_coda, input_injection, start, activation, interleaved, window;
  int32_t first_loop_gate, embedding_type;  // SourceType
  int32_t output_gate, input_addition, norm_after_prelude;  // output_gate: rows behind those of q, k and v
  // Above 0 the block is two stacks, as LoopedConfig has it: its first half runs so often, then its second half once.
  int32_t low_cycles;
  int32_t num_encoder_layers, plain_mlp, bias_distance;  // plain_mlp: down(act(up x))
  float norm_eps, embedding_scale, attention_scale;
  const Layer* layers;  // of prelude, block and coda, then of the encoder
  const void* embedding;          // (vocab_size, hidden_size)
  const float* embedding_scales;  // of int8 rows
  const float* norm;
  Matrix head, adapter;
  const float *cos, *sin;  // (max_positions, rotary_dim / 2), or NULL where scores are biased
  const float *second_cos, *second_sin;  // of layers with second_rope
  const float* logit_scale;              // (vocab_size, padded to 16) or NULL
  const float* low_state;                // (hidden_size) that the low stack starts from
  const float* encoder_norm;             // (hidden_size)
  const float *text_bias, *source_bias;  // (heads, bias_numbers) of attention.h, for each side, or NULL
};

struct Setup {
  int32_t num_threads, spin_microseconds, num_pages, kv_type;  // KvType
  void* cache;   // speed_cache_bytes, zeroed
  float* states; // (num_pages * 16, hidden_size, twice with two stacks), and the block's inputs if loops read them
};

struct Pass {
  int32_t num_rows, num_pages, num_readouts, num_logits, num_noise, num_kept, num_given, encodes;
  const int32_t* tokens;     // of rows in their first loop
  const int32_t* positions;  // (rows)
  const int32_t* loops;      // (rows) 0..num_loops - 1
  const int32_t* tables;     // (rows) where the row's page table begins in `pages`
  const int32_t* pages;      // (num_pages)
  const uint8_t* ends;       // (rows) whether the coda runs behind this loop
  const int32_t* noises;     // (rows) row of `noise` that its state starts from, or -1
  const float* noise;        // (num_noise, hidden_size)
  const int32_t* readouts;   // (readouts) rows, or num_rows + i for row i of `given`
  const int32_t* logit_rows; // (readouts) row of `logits`, or -1
  int32_t* tokens_out;       // (readouts) argmax of each, -1 where a logit is no finite number
  float* logits;             // (num_logits, vocab_size)
  const int32_t* kept;       // (num_kept) rows whose head's inputs go to `kept_out`
  float* kept_out;           // (num_kept, hidden_size)
  const float* given;        // (num_given, hidden_size) head's inputs that earlier passes kept
  const int32_t* lasts;      // (rows) the last position seen, not before the row's own; NULL: that one
  // With an encoder, (rows) each: where the page table of the row's source begins in `pages`, and its last position.
  const int32_t *source_tables, *source_lasts;
};
// A pass that `encodes` has the tokens of sources as its rows, in `tables` and `lasts` of theirs: they go through
// the encoder, and what the decoder's layers read of them is stored. It has no readouts.

// What the time of a pass goes to; as in structs.py.
enum Part { ENTER, MIX_IN, QKV, ATTENTION, OUT, GATE_UP, DOWN, JOIN, HEAD, NUM_PARTS };

struct Engine;

#pragma GCC visibility push(default)
extern "C" {
int32_t speed_interface(void);
// sizeof Matrix, Layer, Model, Setup, Pass, PackJob and of a pointer.
void speed_sizes(int32_t sizes[7]);
const char* speed_level(void);
// Bytes of a packed block of 16 outputs, or 0 for a type or size that there is none of.
uint64_t speed_block_bytes(int32_t type, int32_t inputs);
int32_t speed_pack(const PackJob* job);
uint64_t speed_cache_bytes(const Model* model, int32_t num_pages, int32_t kv_type);
// NULL on failure, and why in `error`. The model's structures are copied, what they point to is not.
Engine* speed_open(const Model* model, const Setup* setup, char* error, int32_t error_bytes);
void speed_close(Engine* engine);
// 0, or 1 and why in `error`; then nothing has been changed.
int32_t speed_run(Engine* engine, const Pass* pass, char* error, int32_t error_bytes);
// Nanoseconds that the calling thread has spent in each part of all passes since the last call, waiting included.
void speed_times(Engine* engine, int64_t nanoseconds[NUM_PARTS]);
// Reads memory from its start to its end, as fast as a thread can; the sum of its words.
uint64_t speed_stream(const void* memory, uint64_t bytes);
}
#pragma GCC visibility pop
