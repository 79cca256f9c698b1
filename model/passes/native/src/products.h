// Rows of activations times packed weights.
//
// A weight matrix is stored in blocks of 16 outputs, channels of the input in order within a block. A row's sum
// runs over the channels in that order whatever the number of rows, so its result is its own, bit for bit.
//
//   fp32   [block][channel][16]
//   bf16   [block][channel / 2][16][2], widened to fp32
//   int8   [block][channel / 4][16][4], or with AVX-512 VNNI the same plus 128; else [block][2][channel / 4][8][4]
//   int4   groups of 32 channels, 16 scales in fp16 each: [block][group]{scales, [2][8][16 bytes]}; the bytes of
//          four channels and eight outputs hold outputs 0..3 in their low halves and 4..7 in their high ones
//
// Against int8 and int4 a row of activations becomes whole numbers of 16 bits ("units") with one scale. Their
// sums are exact, in integers and then fp64, so all levels give the same bits.
#pragma once
#include "vec.h"

enum WeightType { FP32, BF16, INT8, INT4, NUM_WEIGHT_TYPES };
enum {
  BLOCK = 16,         // outputs
  GROUP = 32,         // channels that share a scale in int4; all inputs are padded to it
  MOST_UNITS = 32258, // of the largest activation of a row: 127 * 254, so that it splits into two bytes
  HIGH_UNITS = 254,
  NIBBLE_OFFSET = 8,  // int4 weights are stored with 8 added
  MOST_INPUTS = 65536, // channels: 255 * 127 * 65536 fits 32 bits
  MOST_TILE_ROWS = 6,
};

struct Matrix {  // as in weights.py
  int32_t type, inputs, blocks, unused;
  const uint8_t* data;
  const float* scales;  // int8: one for each output
  const float* bias;    // one for each output, or NULL
};

INLINE int padded_inputs(int inputs) { return (inputs + GROUP - 1) / GROUP * GROUP; }

static inline size_t block_bytes(int type, int inputs) {
  size_t channels = (size_t)padded_inputs(inputs);
  switch (type) {
    case FP32:
      return channels * BLOCK * 4;
    case BF16:
      return channels * BLOCK * 2;
    case INT8:
      return channels * BLOCK;
    default:
      return channels / GROUP * (BLOCK * 2 + GROUP * BLOCK / 2);
  }
}

// Rows of activations in every form that a product may want; `stride` channels apart.
struct Input {
  int stride;
  float* values;        // fp32, bf16
  int16_t* units;       // int8, int4
  int8_t *high, *low;   // the same units as 254 high + low, for VNNI
  float* scales;        // of a row's units
  double* unit_sums;    // of a row
  int32_t* group_offsets;  // what NIBBLE_OFFSET adds to the sums of a row's groups; stride / GROUP apart
};

size_t input_bytes(int rows, int stride);
// Lays an Input for `rows` rows out over zeroed memory of input_bytes, aligned to 64.
Input input_at(void* memory, int rows, int stride);
// Row `row` of the input becomes `values` (count), in the form that weights of this type want.
void encode(const Input& input, int row, int type, const float* values, int count);

// The products of `rows` (1..MOST_TILE_ROWS) rows from `row` on with one block: out[rows][16], scaled and biased.
void multiply(const Matrix& matrix, int block, const Input& input, int row, int rows, float* out);

// Packs rows of a matrix: packed output o is source row `row_map[o]`, zeros where that is negative.
struct PackJob {  // as in weights.py
  int32_t type, source_type, inputs, blocks;  // source_type: SourceType
  const void* source;                         // row-major (source rows, inputs)
  const float* source_scales;                 // of int8 rows, else NULL
  const int32_t* row_map;                     // blocks * 16
  uint8_t* data;                              // blocks * block_bytes
  float* scales;                              // int8: blocks * 16
};
enum SourceType { FROM_FP32, FROM_BF16, FROM_FP16, FROM_INT8 };
void pack(const PackJob& job);
