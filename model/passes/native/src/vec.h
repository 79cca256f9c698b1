// Vectors of 16 lanes on every CPU, and the functions of one number that a transformer needs.
//
// The compiler splits the vectors into the registers that a level has. No function here depends on that split:
// a sum over lanes is always the same tree, so a number has the same bits on AVX2 and on AVX-512.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((ext_vector_type(16)));
typedef float f32x8 __attribute__((ext_vector_type(8)));
typedef float f32x4 __attribute__((ext_vector_type(4)));
typedef int32_t i32x16 __attribute__((ext_vector_type(16)));
typedef uint32_t u32x16 __attribute__((ext_vector_type(16)));
typedef int16_t i16x16 __attribute__((ext_vector_type(16)));
typedef uint16_t u16x16 __attribute__((ext_vector_type(16)));
typedef int8_t i8x16 __attribute__((ext_vector_type(16)));
typedef _Float16 f16x16 __attribute__((ext_vector_type(16)));

enum { LANES = 16 };

INLINE f32x16 splat(float x) { return (f32x16)x; }

template <class V, class T>
INLINE V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
INLINE void store(T* to, V v) {
  memcpy(to, &v, sizeof v);
}

// a * b + c, rounded once where the CPU can; a level without the instruction rounds twice, always.
INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_elementwise_fma(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE f32x16 min16(f32x16 a, f32x16 b) { return a < b ? a : b; }
INLINE f32x16 abs16(f32x16 a) { return (f32x16)((u32x16)a & 0x7fffffffu); }

INLINE float sum_lanes(f32x16 v) {
  f32x8 a = v.lo + v.hi;
  f32x4 b = a.lo + a.hi;
  return (b.x + b.z) + (b.y + b.w);
}

INLINE float max_lanes(f32x16 v) {
  f32x8 a = v.lo > v.hi ? v.lo : v.hi;
  f32x4 b = a.lo > a.hi ? a.lo : a.hi;
  float x = b.x > b.z ? b.x : b.z, y = b.y > b.w ? b.y : b.w;
  return x > y ? x : y;
}

// To the nearest whole number, ties to even; |x| below 2^22.
INLINE f32x16 round16(f32x16 x) { return (x + 12582912.0f) - 12582912.0f; }

INLINE f32x16 widen_half(const uint16_t* from) { return __builtin_convertvector(load<f16x16>(from), f32x16); }

INLINE f32x16 widen_bf16(const uint16_t* from) {
  return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

INLINE float half_to_float(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, sizeof h);
  return (float)h;
}

INLINE uint16_t float_to_half(float x) {  // saturates: an infinite key would make every score NaN
  x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  _Float16 h = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}

INLINE uint16_t float_to_bf16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// To the nearest, ties to even, -127 .. 127; 0 for what is no number.
INLINE int8_t round_to_int8(float x) {
  float inside = x >= 127 ? 127 : x <= -127 ? -127 : x == x ? x : 0;
  return (int8_t)((inside + 12582912.0f) - 12582912.0f);
}

INLINE float bf16_to_float(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

// e^x: 2^n times a Taylor series of degree 7 on |r| <= ln 2 / 2, where its remainder is 5e-9. 0 below -87.3.
INLINE f32x16 exp16(f32x16 x) {
  f32x16 inside = min16(max16(x, splat(-87.3f)), splat(88.3f));
  f32x16 n = round16(inside * 1.44269504f);
  f32x16 r = fma16(n, splat(-0.693359375f), inside);
  r = fma16(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.0f / 5040);
  p = fma16(p, r, splat(1.0f / 720));
  p = fma16(p, r, splat(1.0f / 120));
  p = fma16(p, r, splat(1.0f / 24));
  p = fma16(p, r, splat(1.0f / 6));
  p = fma16(p, r, splat(0.5f));
  p = fma16(p, r, splat(1.0f));
  p = fma16(p, r, splat(1.0f));
  i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
  return x < -87.3f ? splat(0) : p * (f32x16)power;
}

INLINE f32x16 sigmoid16(f32x16 x) { return 1.0f / (1.0f + exp16(-x)); }

// erf by formula 7.1.26 of Abramowitz and Stegun: off by at most 1.5e-7.
INLINE f32x16 erf16(f32x16 x) {
  f32x16 a = abs16(x);
  f32x16 t = 1.0f / fma16(a, splat(0.3275911f), splat(1.0f));
  f32x16 p = splat(1.061405429f);
  p = fma16(p, t, splat(-1.453152027f));
  p = fma16(p, t, splat(1.421413741f));
  p = fma16(p, t, splat(-0.284496736f));
  p = fma16(p, t, splat(0.254829592f));
  f32x16 positive = 1.0f - p * t * exp16(-a * a);
  return x < 0.0f ? -positive : positive;
}

enum Activation { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU_SQUARED, MISH, NUM_ACTIVATIONS };

INLINE f32x16 activate(int kind, f32x16 x) {
  switch (kind) {
    case SILU:
      return x * sigmoid16(x);
    case GELU:
      return 0.5f * x * (1.0f + erf16(x * 0.70710678f));
    case GELU_TANH:  // (1 + tanh u) / 2 is sigmoid(2 u)
      return x * sigmoid16(1.59576912f * fma16(x * x * x, splat(0.044715f), x));
    case QUICK_GELU:
      return x * sigmoid16(1.702f * x);
    case RELU:
      return max16(x, splat(0));
    case RELU_SQUARED:
      return max16(x, splat(0)) * max16(x, splat(0));
    default: {  // mish: tanh(ln(1 + e)) is (e^2 + 2 e) / (e^2 + 2 e + 2); e^20 is as good as infinite
      f32x16 e = exp16(min16(x, splat(20.0f)));
      f32x16 n = e * (e + 2.0f);
      return x > 20.0f ? x : x * (n / (n + 2.0f));
    }
  }
}
