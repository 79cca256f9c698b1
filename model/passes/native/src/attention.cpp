#include "attention.h"

// Numbers of keys and values as they are held. `SCALES` of a type: what stands before 16 positions of a head.
struct Full {
  enum { SCALES = 0 };
  float x;
};
struct Half {
  enum { SCALES = 0 };
  uint16_t bits;
};
struct Brain {  // bf16
  enum { SCALES = 0 };
  uint16_t bits;
};
struct Scaled {
  enum { SCALES = PAGE };
  int8_t x;
};

INLINE f32x16 widen(const Full* from) { return load<f32x16>(from); }
INLINE f32x16 widen(const Half* from) { return widen_half((const uint16_t*)from); }
INLINE f32x16 widen(const Brain* from) { return widen_bf16((const uint16_t*)from); }
INLINE f32x16 widen(const Scaled* from) { return __builtin_convertvector(load<i8x16>(from), f32x16); }
INLINE void narrow(Full* to, float x, float) { to->x = x; }
INLINE void narrow(Half* to, float x, float) { to->bits = float_to_half(x); }
INLINE void narrow(Brain* to, float x, float) { to->bits = float_to_bf16(x); }
INLINE void narrow(Scaled* to, float x, float scale) { to->x = scale > 0 ? round_to_int8(x / scale) : 0; }

template <class T>
INLINE size_t head_bytes(int dim) {  // of 16 positions of one K/V head
  return (size_t)dim * PAGE * sizeof(T) + T::SCALES * sizeof(float);
}

template <class T>
INLINE const float* scales_of(const T* numbers) {  // they stand just before
  return (const float*)((const uint8_t*)numbers - T::SCALES * sizeof(float));
}

constexpr float NEVER = -3e38f;  // the score of a position that is not seen
enum { KEY_PAGES_AHEAD = 4, VALUE_PAGES_AHEAD = 2 };

INLINE void prefetch(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at);
}

template <class T>
INLINE const T* keys_in(const Heads& h, const uint8_t* page, int kv_head) {
  return (const T*)(page + (size_t)kv_head * head_bytes<T>(h.head_dim) + T::SCALES * sizeof(float));
}

template <class T>
INLINE const T* values_in(const Heads& h, const uint8_t* page, int kv_head) {
  const uint8_t* behind_keys = page + (size_t)h.num_kv_heads * head_bytes<T>(h.head_dim);
  return (const T*)(behind_keys + (size_t)kv_head * head_bytes<T>(h.padded_dim) + T::SCALES * sizeof(float));
}

template <class T>
INLINE const T* keys_of(const Heads& h, const Span& s, int page, int kv_head) {
  return keys_in<T>(h, s.slot + (size_t)s.pages[page] * s.page_bytes, kv_head);
}

template <class T>
INLINE const T* values_of(const Heads& h, const Span& s, int page, int kv_head) {
  return values_in<T>(h, s.slot + (size_t)s.pages[page] * s.page_bytes, kv_head);
}

// Scores of one page; the channels' sum is split into even and odd ones, so that products overlap.
template <class T, int H>
INLINE void page_scores(const Heads& h, const T* keys, const float* q, f32x16* scores) {
  f32x16 even[H], odd[H];
  for (int i = 0; i < H; i++) even[i] = odd[i] = splat(0);
  for (int c = 0; c < h.head_dim; c += 2) {
    f32x16 first = widen(keys + c * PAGE), second = widen(keys + (c + 1) * PAGE);
#pragma unroll
    for (int i = 0; i < H; i++) {
      even[i] = fma16(splat(q[i * h.head_dim + c]), first, even[i]);
      odd[i] = fma16(splat(q[i * h.head_dim + c + 1]), second, odd[i]);
    }
  }
  for (int i = 0; i < H; i++) scores[i] = (even[i] + odd[i]) * h.scale;
  if (!T::SCALES) return;
  f32x16 scales = load<f32x16>(scales_of(keys));
  for (int i = 0; i < H; i++) scores[i] *= scales;
}

// Where the biases of a page's 16 positions begin.
INLINE int bias_start(const Span& s, int page) {
  int start = page * PAGE - s.position + s.distance + PAGE - 1, most = 2 * s.distance + PAGE - 1;
  return start < 0 ? 0 : start > most ? most : start;
}

INLINE f32x16 unseen_to_never(f32x16 scores, const Span& s, int page) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i32x16 position = lane + page * PAGE;
  i32x16 seen = position >= s.first & position <= s.last;
  return seen ? scores : splat(NEVER);
}

// Softmax weights, not yet divided by their sum, in place; the sum.
INLINE float weigh(float* scores, int pages) {
  f32x16 top = splat(NEVER), total = splat(0);
  for (int p = 0; p < pages; p++) top = max16(top, load<f32x16>(scores + p * PAGE));
  float most = max_lanes(top);
  for (int p = 0; p < pages; p++) {
    f32x16 score = load<f32x16>(scores + p * PAGE);
    f32x16 weight = score <= NEVER ? splat(0) : exp16(score - most);
    store(scores + p * PAGE, weight);
    total += weight;
  }
  return sum_lanes(total);
}

// Weights times the scales of their values, in place; those of positions that are not seen become anything.
template <class T, int H>
INLINE void scale_weights(const Heads& h, const Span& s, int kv_head, float* weights, size_t stride) {
  int first_page = s.first / PAGE, last_page = s.last / PAGE;
  for (int page = first_page; page <= last_page; page++) {
    f32x16 scales = load<f32x16>(scales_of(values_of<T>(h, s, page, kv_head)));
    float* at = weights + (size_t)(page - first_page) * PAGE;
    for (int i = 0; i < H; i++) store(at + (size_t)i * stride, load<f32x16>(at + (size_t)i * stride) * scales);
  }
}

// Sum of the values of WIDE * 16 channels, for H heads, position by position.
template <class T, int H, int WIDE>
INLINE void mix(const Heads& h, const Span& s, int kv_head, int channel, const float* weights, size_t stride, float* out) {
  f32x16 sums[H][WIDE];
  for (int i = 0; i < H; i++) {
    for (int c = 0; c < WIDE; c++) sums[i][c] = splat(0);
  }
  int first_page = s.first / PAGE, last_page = s.last / PAGE;
  for (int page = first_page; page <= last_page; page++) {
    const T* values = values_of<T>(h, s, page, kv_head) + channel;
    if (channel == 0 && page + VALUE_PAGES_AHEAD <= last_page) {
      prefetch(scales_of(values_of<T>(h, s, page + VALUE_PAGES_AHEAD, kv_head)), head_bytes<T>(h.padded_dim));
    }
    int begin = page == first_page ? s.first % PAGE : 0, end = page == last_page ? s.last % PAGE : PAGE - 1;
    const float* w = weights + (page - first_page) * PAGE;
    for (int j = begin; j <= end; j++) {
#pragma unroll
      for (int c = 0; c < WIDE; c++) {
        f32x16 value = widen(values + j * h.padded_dim + c * LANES);
#pragma unroll
        for (int i = 0; i < H; i++) sums[i][c] = fma16(splat(w[(size_t)i * stride + (size_t)j]), value, sums[i][c]);
      }
    }
  }
  for (int i = 0; i < H; i++) {
    for (int c = 0; c < WIDE; c++) store(out + i * h.padded_dim + channel + c * LANES, sums[i][c]);
  }
}

template <class T, int H>
static void attend_heads(const Heads& h, const Span& s, int kv_head, const float* q, float* scores, float* out) {
  int first_page = s.first / PAGE, pages = s.last / PAGE - first_page + 1;
  size_t stride = (size_t)pages * PAGE;
  for (int p = 0; p < pages; p++) {
    f32x16 found[H];
    if (p + KEY_PAGES_AHEAD < pages) {
      prefetch(scales_of(keys_of<T>(h, s, first_page + p + KEY_PAGES_AHEAD, kv_head)), head_bytes<T>(h.head_dim));
    }
    page_scores<T, H>(h, keys_of<T>(h, s, first_page + p, kv_head), q, found);
    bool inside = p > 0 && p + 1 < pages;
    if (s.bias) {
      const float* bias = s.bias + bias_start(s, first_page + p);
      for (int i = 0; i < H; i++) found[i] += load<f32x16>(bias + (size_t)i * bias_numbers(s.distance));
    }
    for (int i = 0; i < H; i++) {
      f32x16 kept = inside ? found[i] : unseen_to_never(found[i], s, first_page + p);
      store(scores + (size_t)i * stride + (size_t)p * PAGE, kept);
    }
  }
  float sums[H];
  for (int i = 0; i < H; i++) sums[i] = weigh(scores + (size_t)i * stride, pages);
  if (T::SCALES) scale_weights<T, H>(h, s, kv_head, scores, stride);
  int channel = 0;
  if (H < 4) {
    for (; channel + 2 * LANES <= h.padded_dim; channel += 2 * LANES) {
      mix<T, H, 2>(h, s, kv_head, channel, scores, stride, out);
    }
  }
  for (; channel < h.padded_dim; channel += LANES) mix<T, H, 1>(h, s, kv_head, channel, scores, stride, out);
  for (int i = 0; i < H; i++) {
    float share = 1.0f / sums[i];
    for (int c = 0; c < h.padded_dim; c++) out[i * h.padded_dim + c] *= share;
  }
}

template <class T>
static void attend_group(const Heads& h, const Span& s, int kv_head, const float* q, float* scores, float* out) {
  static void (*const SOME[])(const Heads&, const Span&, int, const float*, float*, float*) = {
      attend_heads<T, 1>, attend_heads<T, 2>, attend_heads<T, 3>, attend_heads<T, 4>};
  Span span = s;
  for (int head = 0; head < h.group;) {
    int left = h.group - head, count = left < 4 ? left : 4;
    if (s.bias) span.bias = s.bias + (size_t)(kv_head * h.group + head) * bias_numbers(s.distance);
    SOME[count - 1](h, span, kv_head, q + head * h.head_dim, scores, out + head * h.padded_dim);
    head += count;
  }
}

// work(number) with a number of the type that keys and values are held in.
template <class Work>
INLINE void as_type(int type, Work work) {
  switch (type) {
    case KV_FP32:
      return work(Full());
    case KV_FP16:
      return work(Half());
    case KV_BF16:
      return work(Brain());
    default:
      return work(Scaled());
  }
}

void attend(const Heads& h, const Span& s, int type, int kv_head, const float* q, float* scores, float* out) {
  as_type(type, [&]<class T>(T) { attend_group<T>(h, s, kv_head, q, scores, out); });
}

// What 127 stands for. No number if one of these is none or infinite: then nothing that is read of them is one.
static float scale_of(const float* x, int count) {
  float top = 0, nothing = 0;
  for (int c = 0; c < count; c++) {
    float size = x[c] < 0 ? -x[c] : x[c];
    top = size > top ? size : top;
    nothing += x[c] - x[c];
  }
  return top / 127 + nothing;
}

// One position of a head: number c goes to `to[c * step]`.
template <class T>
INLINE void write_numbers(T* numbers, int offset, int count, const float* from, T* to, int step) {
  float scale = T::SCALES ? scale_of(from, count) : 0;
  if (T::SCALES) ((float*)scales_of(numbers))[offset] = scale;
  for (int c = 0; c < count; c++) narrow(to + c * step, from[c], scale);
}

void write_key(const Heads& h, uint8_t* page, int type, int kv_head, int offset, const float* key) {
  as_type(type, [&]<class T>(T) {
    T* keys = (T*)keys_in<T>(h, page, kv_head);
    write_numbers(keys, offset, h.head_dim, key, keys + offset, PAGE);
  });
}

void write_value(const Heads& h, uint8_t* page, int type, int kv_head, int offset, const float* value) {
  as_type(type, [&]<class T>(T) {
    T* values = (T*)values_in<T>(h, page, kv_head);
    write_numbers(values, offset, h.head_dim, value, values + offset * h.padded_dim, 1);
  });
}

size_t kv_page_bytes(const Heads& h, int type) {
  size_t bytes = 0;
  as_type(type, [&]<class T>(T) { bytes = (size_t)h.num_kv_heads * (head_bytes<T>(h.head_dim) + head_bytes<T>(h.padded_dim)); });
  return bytes;
}
