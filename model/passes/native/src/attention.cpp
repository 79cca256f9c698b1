#include "attention.h"

INLINE f32x16 widen(const float* from) { return load<f32x16>(from); }
INLINE f32x16 widen(const uint16_t* from) { return widen_half(from); }
INLINE void narrow(float* to, float x) { *to = x; }
INLINE void narrow(uint16_t* to, float x) { *to = float_to_half(x); }

constexpr float NEVER = -3e38f;  // the score of a position that is not seen
enum { KEY_PAGES_AHEAD = 4, VALUE_PAGES_AHEAD = 2 };

INLINE void prefetch(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)from + at);
}

template <class T>
INLINE const T* keys_of(const Heads& h, const Span& s, int page, int kv_head) {
  const T* at = (const T*)(s.slot + (size_t)s.pages[page] * s.page_bytes);
  return at + (size_t)kv_head * (size_t)h.head_dim * PAGE;
}

template <class T>
INLINE const T* values_of(const Heads& h, const Span& s, int page, int kv_head) {
  const T* at = (const T*)(s.slot + (size_t)s.pages[page] * s.page_bytes) + key_numbers(h);
  return at + (size_t)kv_head * (size_t)h.padded_dim * PAGE;
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
      prefetch(values_of<T>(h, s, page + VALUE_PAGES_AHEAD, kv_head), (size_t)h.padded_dim * PAGE * sizeof(T));
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
      prefetch(keys_of<T>(h, s, first_page + p + KEY_PAGES_AHEAD, kv_head), (size_t)h.head_dim * PAGE * sizeof(T));
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

void attend(const Heads& h, const Span& s, bool half, int kv_head, const float* q, float* scores, float* out) {
  if (half) {
    attend_group<uint16_t>(h, s, kv_head, q, scores, out);
  } else {
    attend_group<float>(h, s, kv_head, q, scores, out);
  }
}

template <class T>
static void write_key_as(const Heads& h, uint8_t* page, int kv_head, int offset, const float* key) {
  T* to = (T*)page + (size_t)kv_head * (size_t)h.head_dim * PAGE + offset;
  for (int c = 0; c < h.head_dim; c++) narrow(to + c * PAGE, key[c]);
}

template <class T>
static void write_value_as(const Heads& h, uint8_t* page, int kv_head, int offset, const float* value) {
  T* to = (T*)page + key_numbers(h) + ((size_t)kv_head * PAGE + (size_t)offset) * (size_t)h.padded_dim;
  for (int c = 0; c < h.head_dim; c++) narrow(to + c, value[c]);
}

void write_key(const Heads& h, uint8_t* page, bool half, int kv_head, int offset, const float* key) {
  half ? write_key_as<uint16_t>(h, page, kv_head, offset, key) : write_key_as<float>(h, page, kv_head, offset, key);
}

void write_value(const Heads& h, uint8_t* page, bool half, int kv_head, int offset, const float* value) {
  half ? write_value_as<uint16_t>(h, page, kv_head, offset, value) : write_value_as<float>(h, page, kv_head, offset, value);
}
