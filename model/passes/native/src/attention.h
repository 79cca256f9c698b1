// Attention of one row and one K/V head over the pages of its sequence.
//
// A page holds 16 positions of one slot: keys [kv head][channel][16], so that a page's scores need no sum across
// lanes, then values [kv head][16][channels, padded to 16]. Positions are taken in order, pages at their own
// boundaries, so what a row gets depends on its position alone and not on what else runs.
#pragma once
#include "vec.h"

enum { PAGE = 16 };

struct Heads {
  int head_dim, padded_dim;  // channels of a key and, padded to 16, of a value
  int num_kv_heads, group;   // query heads that share a K/V head
  float scale;
};

struct Span {  // what one row sees of one slot
  const uint8_t* slot;  // its first page
  size_t page_bytes;
  const int32_t* pages;
  int first, last;  // positions, both seen
  // What is added to scores by how far a key stands ahead of `position`, -distance - 15 .. distance + 15 for each
  // head; further ones are as the last. NULL: nothing.
  const float* bias;
  int distance, position;
};

static inline size_t bias_numbers(int distance) { return (size_t)(2 * distance + 2 * PAGE - 1); }

static inline size_t key_numbers(const Heads& h) { return (size_t)h.num_kv_heads * (size_t)h.head_dim * PAGE; }
static inline size_t value_numbers(const Heads& h) { return (size_t)h.num_kv_heads * (size_t)h.padded_dim * PAGE; }

// Floats of scratch that `attend` needs for a context of so many positions.
static inline size_t score_numbers(int positions) { return (size_t)(positions + PAGE) * 4; }

// out[group][padded_dim] from q[group][head_dim]; `half`: whether keys and values are fp16 or else fp32.
void attend(const Heads& heads, const Span& span, bool half, int kv_head, const float* q, float* scores, float* out);

void write_key(const Heads& heads, uint8_t* page, bool half, int kv_head, int offset, const float* key);
void write_value(const Heads& heads, uint8_t* page, bool half, int kv_head, int offset, const float* value);
