#include "products.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

size_t input_bytes(int rows, int stride) {
  size_t n = (size_t)rows * (size_t)stride;
  return n * 8 + (size_t)rows * 64 + n / GROUP * 4 + 512;
}

static uint8_t* aligned(uint8_t* p) { return (uint8_t*)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

Input input_at(void* memory, int rows, int stride) {
  size_t n = (size_t)rows * (size_t)stride, r = (size_t)rows;
  uint8_t* p = (uint8_t*)memory;
  Input in;
  in.stride = stride;
  in.values = (float*)p;
  in.units = (int16_t*)p;  // a row is in one form at a time, but not in the same place for every stage
  p = aligned(p + n * 4);
  in.high = (int8_t*)p;
  p = aligned(p + n);
  in.low = (int8_t*)p;
  p = aligned(p + n);
  in.scales = (float*)p;
  p = aligned(p + r * 4);
  in.unit_sums = (double*)p;
  p = aligned(p + r * 8);
  in.group_offsets = (int32_t*)p;
  return in;
}

// NaN where one of them is infinite or none that is a number.
static float largest_magnitude(const float* values, int count) {
  f32x16 top = splat(0), nothing = splat(0);
  for (int i = 0; i < count; i += LANES) {
    f32x16 some = splat(0);
    if (i + LANES <= count) {
      some = load<f32x16>(values + i);
    } else {
      memcpy(&some, values + i, (size_t)(count - i) * 4);
    }
    top = max16(top, abs16(some));
    nothing += some - some;
  }
  return max_lanes(top) + sum_lanes(nothing);
}

// 16 units; a NaN becomes the smallest, so that no conversion is undefined: the row's scale is NaN then.
INLINE i32x16 units_of(f32x16 values, float inverse) {
  f32x16 scaled = values * inverse;
  f32x16 bounded = scaled > (float)-MOST_UNITS ? scaled : splat((float)-MOST_UNITS);
  bounded = bounded < (float)MOST_UNITS ? bounded : splat((float)MOST_UNITS);
  return __builtin_convertvector(round16(bounded), i32x16);
}

INLINE int32_t sum_int_lanes(i32x16 v) {
  int32_t total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

static void encode_units(const Input& in, int row, int type, const float* values, int count) {
  float top = largest_magnitude(values, count);
  float scale = top / (float)MOST_UNITS;
  if (scale < 1.2e-38f) scale = 1.2e-38f;
  float inverse = 1.0f / scale;
  size_t first = (size_t)row * (size_t)in.stride;
  int padded = padded_inputs(count);
  int64_t total = 0;
  for (int i = 0; i < padded; i += LANES) {
    f32x16 some = splat(0);
    if (i + LANES <= count) {
      some = load<f32x16>(values + i);
    } else if (i < count) {
      memcpy(&some, values + i, (size_t)(count - i) * 4);
    }
    i32x16 units = units_of(some, inverse);
#if defined(__AVX512VNNI__)
    i32x16 high = __builtin_convertvector(round16(__builtin_convertvector(units, f32x16) * (1.0f / (float)HIGH_UNITS)), i32x16);
    store(in.high + first + i, __builtin_convertvector(high, i8x16));
    store(in.low + first + i, __builtin_convertvector(units - high * (int)HIGH_UNITS, i8x16));
    bool sums = true;
#else
    store(in.units + first + i, __builtin_convertvector(units, i16x16));
    bool sums = type == INT4;
#endif
    if (!sums) continue;
    int32_t sum = sum_int_lanes(units);
    total += sum;
    int32_t* offset = in.group_offsets + (first + (size_t)i) / GROUP;
    *offset = (i % GROUP ? *offset : 0) + NIBBLE_OFFSET * sum;
  }
  (void)type;
  in.scales[row] = scale;
  in.unit_sums[row] = (double)total;
}

void encode(const Input& in, int row, int type, const float* values, int count) {
  if (type == INT8 || type == INT4) {
    encode_units(in, row, type, values, count);
    return;
  }
  float* to = in.values + (size_t)row * (size_t)in.stride;
  memmove(to, values, (size_t)count * 4);
  memset(to + count, 0, (size_t)(padded_inputs(count) - count) * 4);
}

// The CPU's own prefetching ends at a page. Four rows of the embedded model, one Zen 3 core of a busy machine:
// 7.9 ms without, 7.0 with 1,024 bytes, 6.2 with 2,048, 6.5 with 4,096. Ouro-1.4B's shape, four rows, two cores:
// bf16 195 ms without, 145 with it, int4 104 and 79.
enum { BYTES_AHEAD = 2048 };

// ---- fp32 and bf16 ---------------------------------------------------------------------------------------

struct Fp32 {
  enum { STEP = 1, BYTES = 64 };
  static __attribute__((always_inline)) f32x16 at(const uint8_t* w, int) { return load<f32x16>(w); }
};

struct Bf16 {
  enum { STEP = 2, BYTES = 64 };
  static __attribute__((always_inline)) f32x16 at(const uint8_t* w, int channel) {
    u32x16 pair = load<u32x16>(w);
    return (f32x16)(channel ? pair & 0xffff0000u : pair << 16);
  }
};

template <class Kind, int ROWS>
static void float_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int channels = padded_inputs(m.inputs);
  const uint8_t* w = m.data + (size_t)block * block_bytes(m.type, m.inputs);
  const float* x = in.values + (size_t)row * (size_t)in.stride;
  f32x16 sums[ROWS];
  for (int r = 0; r < ROWS; r++) sums[r] = splat(0);
  for (int k = 0; k < channels; k += Kind::STEP, w += Kind::BYTES) {
    __builtin_prefetch(w + BYTES_AHEAD);
#pragma unroll
    for (int c = 0; c < Kind::STEP; c++) {
      f32x16 weights = Kind::at(w, c);
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[r] = fma16(splat(x[r * in.stride + k + c]), weights, sums[r]);
    }
  }
  for (int r = 0; r < ROWS; r++) store(out + r * BLOCK, sums[r]);
}

// ---- int8 ------------------------------------------------------------------------------------------------

typedef double f64x4 __attribute__((ext_vector_type(4)));
typedef double f64x8 __attribute__((ext_vector_type(8)));

#if defined(__AVX512VNNI__)

template <int ROWS>
static void int8_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int steps = padded_inputs(m.inputs) / 4;
  const uint8_t* w = m.data + (size_t)block * block_bytes(INT8, m.inputs);
  const int8_t *high = in.high + (size_t)row * (size_t)in.stride, *low = in.low + (size_t)row * (size_t)in.stride;
  __m512i highs[ROWS], lows[ROWS];
  for (int r = 0; r < ROWS; r++) highs[r] = lows[r] = _mm512_setzero_si512();
  for (int s = 0; s < steps; s++) {
    __m512i weights = _mm512_loadu_si512(w + s * 64);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      highs[r] = _mm512_dpbusd_epi32(highs[r], weights, _mm512_set1_epi32(load<int32_t>(high + r * in.stride + s * 4)));
      lows[r] = _mm512_dpbusd_epi32(lows[r], weights, _mm512_set1_epi32(load<int32_t>(low + r * in.stride + s * 4)));
    }
  }
  for (int r = 0; r < ROWS; r++) {
    i32x16 h = (i32x16)highs[r], l = (i32x16)lows[r];
    for (int half = 0; half < 2; half++) {
      auto part = [&](i32x16 v) { return __builtin_convertvector(half ? v.hi : v.lo, f64x8); };
      f64x8 total = part(h) * (double)HIGH_UNITS + part(l) - 128.0 * in.unit_sums[row + r];
      f64x8 scales = __builtin_convertvector(load<f32x8>(m.scales + block * BLOCK + half * 8), f64x8);
      store(out + r * BLOCK + half * 8, __builtin_convertvector(total * (double)in.scales[row + r] * scales, f32x8));
    }
  }
}

#elif defined(__AVX2__)

enum { STEPS_AT_ONCE = 256 };  // a lane takes two products of at most 127 * 32258 a step: 256 fit 32 bits

// Sums of 8 outputs from two registers of neighbouring halves of sums.
INLINE void add_exactly(f64x4* totals, __m256i first, __m256i second) {
  __m256i parts[2] = {first, second};
  for (int i = 0; i < 2; i++) {
    __m256d a = _mm256_cvtepi32_pd(_mm256_castsi256_si128(parts[i]));
    __m256d b = _mm256_cvtepi32_pd(_mm256_extracti128_si256(parts[i], 1));
    totals[i] += (f64x4)_mm256_permute4x64_pd(_mm256_hadd_pd(a, b), 0xd8);
  }
}

INLINE __m256i four_units(const int16_t* units) { return _mm256_set1_epi64x(load<int64_t>(units)); }

template <int ROWS>
static void int8_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int steps = padded_inputs(m.inputs) / 4;
  size_t stride = (size_t)in.stride;
  for (int half = 0; half < 2; half++) {
    const uint8_t* w = m.data + ((size_t)block * 2 + (size_t)half) * (size_t)steps * 32;
    const int16_t* x = in.units + (size_t)row * stride;
    f64x4 totals[ROWS][2];
    for (int r = 0; r < ROWS; r++) totals[r][0] = totals[r][1] = (f64x4)(0.0);
    for (int begin = 0; begin < steps; begin += STEPS_AT_ONCE) {
      int end = begin + STEPS_AT_ONCE < steps ? begin + STEPS_AT_ONCE : steps;
      __m256i a[ROWS], b[ROWS];
      for (int r = 0; r < ROWS; r++) a[r] = b[r] = _mm256_setzero_si256();
      for (int s = begin; s < end; s++, w += 32, x += 4) {
        __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
        __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)));
        __builtin_prefetch(w + BYTES_AHEAD);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          __m256i units = four_units(x + (size_t)r * stride);
          a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(first, units));
          b[r] = _mm256_add_epi32(b[r], _mm256_madd_epi16(second, units));
        }
      }
      for (int r = 0; r < ROWS; r++) add_exactly(totals[r], a[r], b[r]);
    }
    for (int r = 0; r < ROWS; r++) {
      for (int i = 0; i < 2; i++) {
        int output = half * 8 + i * 4;
        f64x4 scales = __builtin_convertvector(load<f32x4>(m.scales + block * BLOCK + output), f64x4);
        store(out + r * BLOCK + output,
              __builtin_convertvector(totals[r][i] * (double)in.scales[row + r] * scales, f32x4));
      }
    }
  }
}

#else

template <int ROWS>
static void int8_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int channels = padded_inputs(m.inputs);
  for (int r = 0; r < ROWS; r++) {
    const int16_t* x = in.units + (size_t)(row + r) * (size_t)in.stride;
    for (int o = 0; o < BLOCK; o++) {
      const int8_t* w = (const int8_t*)m.data + ((size_t)block * 2 + (size_t)(o / 8)) * (size_t)channels * 8 + o % 8 * 4;
      double total = 0;
      for (int begin = 0; begin < channels; begin += 512) {  // 512 products of at most 127 * 32258 fit 32 bits
        int32_t sum = 0;
        for (int k = begin; k < channels && k < begin + 512; k++) sum += w[k / 4 * 32 + k % 4] * x[k];
        total += sum;
      }
      out[r * BLOCK + o] = (float)(total * (double)in.scales[row + r] * (double)m.scales[block * BLOCK + o]);
    }
  }
}

#endif

// ---- int4 ------------------------------------------------------------------------------------------------

enum { GROUP_BYTES = BLOCK * 2 + GROUP * BLOCK / 2, HALF_BYTES = GROUP * 8 / 2 };

// Whole-number sums of nibbles (0..15) times the units of a group: 16 outputs for each row.
#if defined(__AVX512VNNI__)

template <int ROWS>
INLINE void group_sums(const uint8_t* w, const Input& in, size_t first, i32x16* sums) {
  const __m256i low_half = _mm256_set1_epi8(15);
  __m512i highs[ROWS], lows[ROWS];
  for (int r = 0; r < ROWS; r++) highs[r] = lows[r] = _mm512_setzero_si512();
  for (int s = 0; s < GROUP / 4; s++) {
    __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(w + s * 16))),
                                            _mm_loadu_si128((const __m128i*)(w + HALF_BYTES + s * 16)), 1);
    __m256i even = _mm256_and_si256(bytes, low_half), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
    // even: outputs 0..3 and 8..11, odd: 4..7 and 12..15
    __m512i weights = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_permute2x128_si256(even, odd, 0x20)),
                                         _mm256_permute2x128_si256(even, odd, 0x31), 1);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      size_t at = first + (size_t)r * (size_t)in.stride + (size_t)s * 4;
      highs[r] = _mm512_dpbusd_epi32(highs[r], weights, _mm512_set1_epi32(load<int32_t>(in.high + at)));
      lows[r] = _mm512_dpbusd_epi32(lows[r], weights, _mm512_set1_epi32(load<int32_t>(in.low + at)));
    }
  }
  for (int r = 0; r < ROWS; r++) sums[r] = (i32x16)highs[r] * (int)HIGH_UNITS + (i32x16)lows[r];
}

#elif !defined(__AVX2__)

template <int ROWS>
INLINE void group_sums(const uint8_t* w, const Input& in, size_t first, i32x16* sums) {
  for (int r = 0; r < ROWS; r++) {
    const int16_t* x = in.units + first + (size_t)r * (size_t)in.stride;
    for (int o = 0; o < BLOCK; o++) {
      const uint8_t* bytes = w + o / 8 * HALF_BYTES + o % 4 * 4;
      int32_t sum = 0;
      for (int k = 0; k < GROUP; k++) sum += (bytes[k / 4 * 16 + k % 4] >> (o % 8 / 4 * 4) & 15) * x[k];
      sums[r][o] = sum;
    }
  }
}

#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

INLINE __m256 swap_middle(__m256 v) {  // of four pairs
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}

// Half a block at a time: then the sums of a group and of all groups before it stay in registers. Totals have
// the order of _mm256_hadd_epi32: outputs 0, 1, 4, 5, 2, 3, 6, 7.
template <int ROWS>
INLINE void int4_half_tile(const uint8_t* w, int half, int groups, const Input& in, int row, float* out) {
  const __m256i low_half = _mm256_set1_epi16(15);
  size_t first = (size_t)row * (size_t)in.stride, group_stride = (size_t)in.stride / GROUP;
  const int16_t* x = in.units + first;
  const int32_t* offsets = in.group_offsets + first / GROUP;
  const uint8_t* ahead = w + groups * GROUP_BYTES * (half + 2) / 2;  // half of the next block
  __m256 totals[ROWS];
  for (int r = 0; r < ROWS; r++) totals[r] = _mm256_setzero_ps();
  for (int g = 0; g < groups; g++, w += GROUP_BYTES, x += GROUP, offsets++) {
    const uint8_t* bytes = w + BLOCK * 2 + half * HALF_BYTES;
    for (int line = 0; line < GROUP_BYTES / 2; line += 64) __builtin_prefetch(ahead + line);
    ahead += GROUP_BYTES / 2;
    __m256i a[ROWS], b[ROWS];
    for (int r = 0; r < ROWS; r++) a[r] = b[r] = _mm256_setzero_si256();
#pragma unroll
    for (int s = 0; s < GROUP / 4; s++) {
      __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + s * 16)));
      __m256i even = _mm256_and_si256(wide, low_half), odd = _mm256_srli_epi16(wide, 4);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        __m256i units = four_units(x + (size_t)r * (size_t)in.stride + (size_t)s * 4);
        a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(even, units));
        b[r] = _mm256_add_epi32(b[r], _mm256_madd_epi16(odd, units));
      }
    }
    __m256 scales = swap_middle(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + half * 16))));
    for (int r = 0; r < ROWS; r++) {
      __m256i offset = _mm256_set1_epi32(offsets[(size_t)r * group_stride]);
      __m256i sums = _mm256_sub_epi32(_mm256_hadd_epi32(a[r], b[r]), offset);
      totals[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scales, totals[r]);
    }
  }
  for (int r = 0; r < ROWS; r++) {
    store(out + r * BLOCK + half * 8, _mm256_mul_ps(swap_middle(totals[r]), _mm256_set1_ps(in.scales[row + r])));
  }
}

template <int ROWS>
static void int4_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int groups = padded_inputs(m.inputs) / GROUP;
  const uint8_t* w = m.data + (size_t)block * block_bytes(INT4, m.inputs);
  for (int half = 0; half < 2; half++) int4_half_tile<ROWS>(w, half, groups, in, row, out);
}

#else

template <int ROWS>
static void int4_tile(const Matrix& m, int block, const Input& in, int row, float* out) {
  int groups = padded_inputs(m.inputs) / GROUP;
  const uint8_t* w = m.data + (size_t)block * block_bytes(INT4, m.inputs);
  size_t first = (size_t)row * (size_t)in.stride;
  f32x16 totals[ROWS];
  for (int r = 0; r < ROWS; r++) totals[r] = splat(0);
  for (int g = 0; g < groups; g++, w += GROUP_BYTES, first += GROUP) {
    i32x16 sums[ROWS];
    group_sums<ROWS>(w + BLOCK * 2, in, first, sums);
    f32x16 scales = widen_half((const uint16_t*)w);
    for (int r = 0; r < ROWS; r++) {
      int32_t offset = in.group_offsets[(first + (size_t)r * (size_t)in.stride) / GROUP];
      totals[r] = fma16(__builtin_convertvector(sums[r] - offset, f32x16), scales, totals[r]);
    }
  }
  for (int r = 0; r < ROWS; r++) store(out + r * BLOCK, totals[r] * in.scales[row + r]);
}

#endif

// ---- the choice ------------------------------------------------------------------------------------------

typedef void (*Tile)(const Matrix&, int block, const Input&, int row, float* out);

#define TILES(name) {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>}
#define FLOAT_TILES(kind) \
  {float_tile<kind, 1>, float_tile<kind, 2>, float_tile<kind, 3>, float_tile<kind, 4>, float_tile<kind, 5>, float_tile<kind, 6>}

static const Tile TILE[NUM_WEIGHT_TYPES][MOST_TILE_ROWS] = {FLOAT_TILES(Fp32), FLOAT_TILES(Bf16), TILES(int8_tile),
                                                            TILES(int4_tile)};

void multiply(const Matrix& m, int block, const Input& in, int row, int rows, float* out) {
  TILE[m.type][rows - 1](m, block, in, row, out);
  if (!m.bias) return;
  f32x16 bias = load<f32x16>(m.bias + block * BLOCK);
  for (int r = 0; r < rows; r++) store(out + r * BLOCK, load<f32x16>(out + r * BLOCK) + bias);
}
