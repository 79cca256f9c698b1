#include "products.h"

static float number(const PackJob& job, int row, int channel) {
  size_t at = (size_t)row * (size_t)job.inputs + (size_t)channel;
  switch (job.source_type) {
    case FROM_FP32:
      return ((const float*)job.source)[at];
    case FROM_BF16:
      return bf16_to_float(((const uint16_t*)job.source)[at]);
    case FROM_FP16:
      return half_to_float(((const uint16_t*)job.source)[at]);
    default:
      return (float)((const int8_t*)job.source)[at] * job.source_scales[row];
  }
}

static float rounded(float x) { return x + 12582912.0f - 12582912.0f; }

static float int8_scale(const PackJob& job, int row) {
  if (job.source_type == FROM_INT8) return job.source_scales[row];
  float top = 0;
  for (int k = 0; k < job.inputs; k++) {
    float magnitude = __builtin_fabsf(number(job, row, k));
    if (magnitude > top) top = magnitude;
  }
  float scale = top / 127.0f;
  return scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
}

static int8_t int8_number(const PackJob& job, int row, int channel, float scale) {
  if (job.source_type == FROM_INT8) {
    return ((const int8_t*)job.source)[(size_t)row * (size_t)job.inputs + (size_t)channel];
  }
  float q = rounded(number(job, row, channel) / scale);
  return (int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
}

static size_t int8_place(int channels, int output, int channel) {
#if defined(__AVX512VNNI__)
  (void)channels;
  return (size_t)(channel / 4 * 64 + output * 4 + channel % 4);
#else
  return (size_t)(output / 8 * channels * 8 + channel / 4 * 32 + output % 8 * 4 + channel % 4);
#endif
}

static void pack_int8_row(const PackJob& job, uint8_t* block, int output, int row, float* scale) {
#if defined(__AVX512VNNI__)
  const int offset = 128;
#else
  const int offset = 0;
#endif
  int channels = padded_inputs(job.inputs);
  *scale = row < 0 ? 0.0f : int8_scale(job, row);
  for (int k = 0; k < channels; k++) {
    int value = row < 0 || k >= job.inputs ? 0 : int8_number(job, row, k, *scale);
    block[int8_place(channels, output, k)] = (uint8_t)(value + offset);
  }
}

// Round to nearest, 16 steps from -8 to 7, the number of largest magnitude at -8 exactly but for fp16's rounding.
static void pack_int4_group(const PackJob& job, uint8_t* group, int output, int row, int first) {
  float values[GROUP], top = 0;
  for (int i = 0; i < GROUP; i++) {
    values[i] = row < 0 || first + i >= job.inputs ? 0.0f : number(job, row, first + i);
    if (__builtin_fabsf(values[i]) > __builtin_fabsf(top)) top = values[i];
  }
  uint16_t bits = float_to_half(top / -8.0f);
  float scale = half_to_float(bits);
  memcpy(group + output * 2, &bits, sizeof bits);
  uint8_t* bytes = group + BLOCK * 2 + output / 8 * (GROUP * 8 / 2) + output % 4 * 4;
  int shift = output % 8 / 4 * 4;
  for (int i = 0; i < GROUP; i++) {
    float q = scale == 0 ? 0.0f : rounded(values[i] / scale);
    int value = (int)(q > 7 ? 7 : q < -8 ? -8 : q) + 8;
    uint8_t* byte = bytes + i / 4 * 16 + i % 4;
    *byte = (uint8_t)((*byte & (15 << (4 - shift))) | value << shift);
  }
}

static void pack_row(const PackJob& job, uint8_t* block, int output, int row, float* scale) {
  int channels = padded_inputs(job.inputs);
  if (job.type == INT8) {
    pack_int8_row(job, block, output, row, scale);
    return;
  }
  if (job.type == INT4) {
    const size_t group_bytes = BLOCK * 2 + GROUP * BLOCK / 2;
    for (int k = 0; k < channels; k += GROUP) {
      pack_int4_group(job, block + (size_t)(k / GROUP) * group_bytes, output, row, k);
    }
    return;
  }
  for (int k = 0; k < channels; k++) {
    float value = row < 0 || k >= job.inputs ? 0.0f : number(job, row, k);
    if (job.type == FP32) {
      memcpy(block + ((size_t)k * BLOCK + (size_t)output) * 4, &value, 4);
    } else {
      uint16_t bits = float_to_bf16(value);
      memcpy(block + ((size_t)(k / 2) * BLOCK * 2 + (size_t)output * 2 + (size_t)(k % 2)) * 2, &bits, 2);
    }
  }
}

void pack(const PackJob& job) {
  size_t bytes = block_bytes(job.type, job.inputs);
  for (int o = 0; o < job.blocks * BLOCK; o++) {
    float unused, *scale = job.scales ? job.scales + o : &unused;
    pack_row(job, job.data + (size_t)(o / BLOCK) * bytes, o % BLOCK, job.row_map[o], scale);
  }
}
