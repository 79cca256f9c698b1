// Attention of one row and one K/V head over the pages of its sequence.
//
// A page holds 16 positions of one slot: keys [kv head][channel][16], so that a page's scores need no sum across
// lanes, then values [kv head][16][channels, padded to 16]. In KV_INT8 each head's keys, and its values, stand
// behind 16 scales in fp32, one for each position. Positions are taken in order, pages at their own boundaries, and
// what is written is rounded once: so what a row gets depends on its position alone and not on what else runs.
#pragma once
#include "vec.h"

enum { PAGE = 16 };

enum KvType { KV_FP32, KV_FP16, KV_BF16, KV_INT8, NUM_KV_TYPES };  // as in structs.py

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

size_t kv_page_bytes(const Heads& heads, int type);

// Floats of scratch that `attend` needs for a context of so many positions.
static inline size_t score_numbers(int positions) { return (size_t)(positions + PAGE) * 4; }

// out[group][padded_dim] from q[group][head_dim]; keys and values are of this KvType.
void attend(const Heads& heads, const Span& span, int type, int kv_head, const float* q, float* scores, float* out);

void write_key(const Heads& heads, uint8_t* page, int type, int kv_head, int offset, const float* key);
void write_value(const Heads& heads, uint8_t* page, int type, int kv_head, int offset, const float* value);
