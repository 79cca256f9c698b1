#include "sampling.h"

#include <stdarg.h>
#include <stdio.h>

#include "engine.h"

namespace {

constexpr float NOTHING = -__builtin_inff();
constexpr float FIRST_REACH = 8;  // below the largest score: most often it holds all that the filters keep
constexpr int TOP_BITS = 11, MIDDLE_BITS = 11, LOW_BITS = 10;

// ---- noise -----------------------------------------------------------------------------------------------

// Philox4x64-10 (Salmon et al. 2011; Random123), as in noise.py.
void philox(uint64_t seed, uint64_t position, uint64_t block, uint64_t words[4]) {
  uint64_t a = block, b = position, c = 0, d = 0, first = seed, second = 0;
  for (int turn = 0; turn < 10; turn++) {
    unsigned __int128 left = (unsigned __int128)a * 0xD2E7470EE14C6C93u, right = (unsigned __int128)c * 0xCA5A826395121157u;
    a = (uint64_t)(right >> 64) ^ b ^ first;
    b = (uint64_t)right;
    c = (uint64_t)(left >> 64) ^ d ^ second;
    d = (uint64_t)left;
    first += 0x9E3779B97F4A7C15u;
    second += 0xBB67AE8584CAA73Bu;
  }
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// 2 artanh(t) by its series, |t| <= 0.172: off by less than 1e-15.
double twice_artanh(double t) {
  double z = t * t, sum = 0;
  for (int n = 19; n >= 1; n -= 2) sum = sum * z + 1.0 / n;
  return 2 * t * sum;
}

double natural_log(double x) {  // x > 0 and normal
  uint64_t bits;
  memcpy(&bits, &x, 8);
  int64_t exponent = (int64_t)(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  double mantissa;
  memcpy(&mantissa, &bits, 8);
  if (mantissa > 1.4142135623730951) mantissa *= 0.5, exponent++;
  return (double)exponent * 0.6931471805599453 + twice_artanh((mantissa - 1) / (mantissa + 1));
}

// A random word as a number w in 0..1, fine-grained near 0, where the winner is.
float uniform(uint64_t word) {
  float w = (float)word * 0x1p-64f;
  return w < 0x1p-65f ? 0x1p-65f : w > 1 - 0x1p-24f ? 1 - 0x1p-24f : w;
}

// -log(-log(1 - w)), in double precision and rounded once.
float gumbel(float w) {
  double x = w;
  double y = x < 0.25 ? twice_artanh(x / (2 - x)) : -natural_log(1 - x);
  return (float)-natural_log(y);
}

// At least gumbel(w), by the exponent of w alone: -log(-log(1 - w)) <= -log(w).
float gumbel_at_most(float w) {
  uint32_t bits;
  memcpy(&bits, &w, 4);
  return (float)(127 - (int)(bits >> 23)) * 0.69314724f;
}

// ---- rows of scores, padded to whole vectors with -infinity ----------------------------------------------

int padded_size(const Engine& e) { return (e.model.vocab_size + LANES - 1) / LANES * LANES; }

f32x16 load_some(const float* from, int count) {  // -infinity behind the first `count` lanes
  if (count >= LANES) return load<f32x16>(from);
  f32x16 v = splat(NOTHING);
  memcpy(&v, from, (size_t)count * 4);
  return v;
}

float largest(const float* x, int size) {
  f32x16 top = splat(NOTHING);
  for (int i = 0; i < size; i += LANES) top = max16(load_some(x + i, size - i), top);
  return max_lanes(top);
}

int first_at(const float* x, int size, float value) {
  for (int i = 0; i < size; i++) {
    if (x[i] == value) return i;
  }
  return 0;
}

// The sum of e^(x - top) over the numbers of at least `least`; long rows don't lose small numbers.
double sum_of_exponentials(const float* x, int size, float top, float least) {
  double total = 0;
  for (int start = 0; start < size; start += 64 * LANES) {
    f32x16 sum = splat(0);
    for (int i = start; i < size && i < start + 64 * LANES; i += LANES) {
      f32x16 v = load_some(x + i, size - i);
      sum += v >= least ? exp16(v - top) : splat(0);
    }
    total += (double)sum_lanes(sum);
  }
  return total;
}

// ---- penalties -------------------------------------------------------------------------------------------

void adjust(const Choice& c, float* scores, int vocab_size) {
  for (int i = 0; i < c.num_counted; i++) {
    float* score = scores + c.counted[i];
    float output = (float)c.outputs[i];
    *score = *score > 0 ? *score / c.repetition : *score * c.repetition;
    *score -= c.frequency * output + c.presence * (output > 0 ? 1.0f : 0.0f);
  }
  for (int i = 0; i < c.num_biased; i++) scores[c.biased[i]] += c.biases[i];
  for (int i = 0; c.forbidden && i < vocab_size; i++) scores[i] = c.forbidden[i] ? NOTHING : scores[i];
  for (int i = 0; i < c.num_banned; i++) scores[c.banned[i]] = NOTHING;
}

float divide(float* scores, int size, float temperature) {  // the largest of what comes out
  f32x16 top = splat(NOTHING);
  for (int i = 0; i < size; i += LANES) {
    f32x16 v = load<f32x16>(scores + i) / temperature;
    store(scores + i, v);
    top = max16(v, top);
  }
  return max_lanes(top);
}

// ---- filters ---------------------------------------------------------------------------------------------

struct Kept {  // the scores of at least some bound, in order, and what each of them counts
  float *scores, *weights;
  int count;
};

void gather(const float* scores, int size, float least, Kept& kept) {
  kept.count = 0;
  for (int i = 0; i < size; i += LANES) {
    if (!(max_lanes(load<f32x16>(scores + i)) >= least)) continue;
    for (int lane = 0; lane < LANES; lane++) {
      if (scores[i + lane] >= least) kept.scores[kept.count++] = scores[i + lane];
    }
  }
}

void weigh(Kept& kept, float top) {  // e^(score - top) each; the arrays have room for whole vectors
  for (int i = kept.count; i % LANES; i++) kept.scores[i] = NOTHING;
  for (int i = 0; i < kept.count; i += LANES) store(kept.weights + i, exp16(load<f32x16>(kept.scores + i) - top));
}

uint32_t order_of(float x) {  // ascends with x
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float with_order(uint32_t order) {
  uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The smallest score of which all greater ones together weigh less than `limit`: digit by digit of its order.
float smallest_within(const Kept& kept, bool each_counts_one, double limit) {
  double bins[1 << TOP_BITS], above = 0;
  uint32_t prefix = 0, known = 0;
  const int shifts[3] = {MIDDLE_BITS + LOW_BITS, LOW_BITS, 0}, widths[3] = {TOP_BITS, MIDDLE_BITS, LOW_BITS};
  for (int digit = 0; digit < 3; digit++) {
    uint32_t mask = (1u << widths[digit]) - 1;
    bool filled[1 << TOP_BITS] = {};
    for (uint32_t bin = 0; bin <= mask; bin++) bins[bin] = 0;
    for (int i = 0; i < kept.count; i++) {
      uint32_t order = order_of(kept.scores[i]), bin = order >> shifts[digit] & mask;
      if ((order & known) != prefix) continue;
      bins[bin] += each_counts_one ? 1 : (double)kept.weights[i];
      filled[bin] = true;
    }
    double sum = above;
    uint32_t chosen = mask;
    for (uint32_t bin = mask + 1; bin-- > 0;) {
      if (!filled[bin]) continue;
      chosen = bin, above = sum;
      sum += bins[bin];
      if (!(sum < limit)) break;
    }
    prefix |= chosen << shifts[digit];
    known |= mask << shifts[digit];
  }
  return with_order(prefix);
}

float within_top_k(const Choice& c, const float* scores, int size, float top, float least, Kept& kept) {
  for (float reach = FIRST_REACH;; reach *= 4) {
    bool all = !(top - reach > least);
    gather(scores, size, all ? least : top - reach, kept);
    if (kept.count >= c.top_k) return smallest_within(kept, true, c.top_k);
    if (all) return least;
  }
}

float within_top_p(const Choice& c, const float* scores, int size, float top, float least, Kept& kept) {
  double limit = (double)c.top_p * sum_of_exponentials(scores, size, top, least);
  for (float reach = FIRST_REACH;; reach *= 4) {
    bool all = !(top - reach > least);
    gather(scores, size, all ? least : top - reach, kept);
    weigh(kept, top);
    double sum = 0;
    for (int i = 0; i < kept.count; i++) sum += (double)kept.weights[i];
    if (all || sum >= limit) return smallest_within(kept, false, limit);
  }
}

// The smallest score that min_p, top_k and top_p, one behind the other, keep; ties with it are kept too.
float least_kept(const Choice& c, const float* scores, int size, float top, Kept& kept) {
  float least = -__FLT_MAX__;
  if (c.min_p > 0) {
    float floor = top + (float)natural_log((double)c.min_p);
    if (floor > least) least = floor;
  }
  if (c.top_k > 0) least = within_top_k(c, scores, size, top, least, kept);
  if (c.top_p < 1) least = within_top_p(c, scores, size, top, least, kept);
  return least;
}

// ---- a token ---------------------------------------------------------------------------------------------

// The argmax of score + noise over the scores of at least `least`. Noise is made where a score is kept, and of its
// logarithms only those whose bound could win.
int draw(const Choice& c, const float* scores, int size, float least) {
  int token = 0;
  float best = NOTHING;
  for (int start = 0; start < size; start += LANES) {
    if (!(max_lanes(load<f32x16>(scores + start)) >= least)) continue;
    for (int i = start; i < start + LANES; i += 4) {
      if (!(scores[i] >= least || scores[i + 1] >= least || scores[i + 2] >= least || scores[i + 3] >= least)) continue;
      uint64_t words[4];
      philox(c.seed, (uint64_t)c.position, (uint64_t)i / 4 + 1, words);
      for (int lane = 0; lane < 4; lane++) {
        float w = uniform(words[lane]), score = scores[i + lane];
        if (!(score >= least) || score + gumbel_at_most(w) < best) continue;
        float total = score + gumbel(w);
        if (total > best) best = total, token = i + lane;
      }
    }
  }
  return token;
}

int choose(const Choice& c, const float* logits, int vocab_size, float* scratch) {
  int size = (vocab_size + LANES - 1) / LANES * LANES;
  float* scores = scratch;
  Kept kept = {scratch + size, scratch + 2 * size, 0};
  memcpy(scores, logits, (size_t)vocab_size * 4);
  for (int i = vocab_size; i < size; i++) scores[i] = NOTHING;
  adjust(c, scores, vocab_size);
  if (!(c.temperature > 0)) return first_at(scores, vocab_size, largest(scores, size));
  float top = divide(scores, size, c.temperature);
  return draw(c, scores, size, least_kept(c, scores, size, top, kept));
}

// The `count` largest numbers in descending order, of equal ones the first ones first; those behind the end of a
// short row are token -1.
void likeliest(const float* x, int size, int count, int32_t* tokens, float* values) {
  for (int n = 0; n < count; n++) tokens[n] = -1, values[n] = NOTHING;
  for (int start = 0; start < size && count; start += LANES) {
    if (!(max_lanes(load_some(x + start, size - start)) > values[count - 1]) && tokens[count - 1] >= 0) continue;
    for (int i = start; i < size && i < start + LANES; i++) {
      if (tokens[count - 1] >= 0 && !(x[i] > values[count - 1])) continue;
      int place = count - 1;
      for (; place > 0 && (tokens[place - 1] < 0 || x[i] > values[place - 1]); place--) {
        tokens[place] = tokens[place - 1], values[place] = values[place - 1];
      }
      tokens[place] = i, values[place] = x[i];
    }
  }
}

void score(const Scoring& s, int row, int vocab_size) {
  const float* logits = s.logits + (size_t)s.rows[row] * (size_t)vocab_size;
  float top = largest(logits, vocab_size), own = logits[s.tokens[row]];
  double whole = (double)top + natural_log(sum_of_exponentials(logits, vocab_size, top, NOTHING));
  int rank = 1;
  for (int i = 0; i < vocab_size; i++) rank += logits[i] > own;
  s.logprobs[row] = (float)((double)own - whole);
  s.ranks[row] = rank;
  size_t first = (size_t)row * (size_t)s.num_top;
  likeliest(logits, vocab_size, s.num_top, s.top_tokens + first, s.top_logprobs + first);
  for (int n = 0; n < s.num_top; n++) {
    float* value = s.top_logprobs + first + n;
    *value = (float)((double)*value - whole);
  }
}

// ---- what may be asked -----------------------------------------------------------------------------------

bool refuse(char* error, int32_t bytes, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (error && bytes > 0) vsnprintf(error, (size_t)bytes, format, arguments);
  va_end(arguments);
  return false;
}

bool check_tokens(const char* name, const int32_t* tokens, int count, int vocab_size, char* error, int32_t bytes) {
  if (count < 0 || (count && !tokens)) return refuse(error, bytes, "%s are missing", name);
  for (int i = 0; i < count; i++) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) return refuse(error, bytes, "%s: token %d is outside 0 to %d", name, tokens[i], vocab_size - 1);
  }
  return true;
}

bool check_rows(const float* logits, const int32_t* rows, int num_rows, int num_logits, char* error, int32_t bytes) {
  if (num_rows < 1 || num_rows > MAX_CHUNKS) return refuse(error, bytes, "rows are %d; 1 to %d are possible", num_rows, (int)MAX_CHUNKS);
  if (!logits || !rows) return refuse(error, bytes, "logits are missing");
  for (int i = 0; i < num_rows; i++) {
    if (rows[i] < 0 || rows[i] >= num_logits) return refuse(error, bytes, "logits row is %d; 0 to %d are possible", rows[i], num_logits - 1);
  }
  return true;
}

bool check_choice(const Choice& c, int vocab_size, char* error, int32_t bytes) {
  if (!(c.temperature >= 0 && c.temperature <= __FLT_MAX__)) return refuse(error, bytes, "temperature is %g", (double)c.temperature);
  if (!(c.top_p >= 0 && c.top_p <= 1)) return refuse(error, bytes, "top_p is %g", (double)c.top_p);
  if (!(c.min_p >= 0 && c.min_p <= 1)) return refuse(error, bytes, "min_p is %g", (double)c.min_p);
  if (c.num_counted && !c.outputs) return refuse(error, bytes, "counts are missing");
  if (c.num_biased && !c.biases) return refuse(error, bytes, "biases are missing");
  return check_tokens("counted", c.counted, c.num_counted, vocab_size, error, bytes) &&
         check_tokens("biased", c.biased, c.num_biased, vocab_size, error, bytes) &&
         check_tokens("banned", c.banned, c.num_banned, vocab_size, error, bytes);
}

bool check_choosing(const Choosing& w, int vocab_size, char* error, int32_t bytes) {
  if (!check_rows(w.logits, w.rows, w.num_rows, w.num_logits, error, bytes)) return false;
  if (!w.choices || !w.tokens || !w.scratch) return refuse(error, bytes, "choices are missing");
  for (int i = 0; i < w.num_rows; i++) {
    if (!check_choice(w.choices[i], vocab_size, error, bytes)) return false;
  }
  return true;
}

bool check_scoring(const Scoring& w, int vocab_size, char* error, int32_t bytes) {
  if (!check_rows(w.logits, w.rows, w.num_rows, w.num_logits, error, bytes)) return false;
  if (w.num_top < 0 || w.num_top > vocab_size) return refuse(error, bytes, "num_top is %d; 0 to %d are possible", w.num_top, vocab_size);
  if (!w.logprobs || !w.ranks || (w.num_top && (!w.top_tokens || !w.top_logprobs))) return refuse(error, bytes, "places for scores are missing");
  return check_tokens("scored", w.tokens, w.num_rows, vocab_size, error, bytes);
}

// ---- all rows, side by side ------------------------------------------------------------------------------

template <class Row>
struct Rows {
  int count;
  Row work;  // of a row, by a thread
};

template <class Row>
void run_rows(Worker* self, void* context) {
  auto& rows = *(Rows<Row>*)context;
  run_stage(self, rows.count, [&](int row) { rows.work(row, self->index); });
}

template <class Row>
void each_row(Engine* e, int count, Row work) {
  if (count == 1) return work(0, 0);  // no thread is woken for it
  Rows<Row> rows = {count, work};
  pool_run(e->pool, run_rows<Row>, &rows);
}

}  // namespace

void speed_sampling_sizes(int32_t sizes[3]) {
  sizes[0] = sizeof(Choice), sizes[1] = sizeof(Choosing), sizes[2] = sizeof(Scoring);
}

uint64_t speed_scratch_bytes(const Engine* e) {
  return e ? (uint64_t)pool_threads(e->pool) * 3 * (uint64_t)padded_size(*e) * 4 : 0;
}

int32_t speed_choose(Engine* e, const Choosing* work, char* error, int32_t bytes) {
  if (!e || !work) return refuse(error, bytes, "no engine or no rows"), 1;
  int vocab_size = e->model.vocab_size;
  if (!check_choosing(*work, vocab_size, error, bytes)) return 1;
  each_row(e, work->num_rows, [=](int row, int thread) {
    const float* logits = work->logits + (size_t)work->rows[row] * (size_t)vocab_size;
    float* scratch = work->scratch + (size_t)thread * 3 * (size_t)padded_size(*e);
    work->tokens[row] = choose(work->choices[row], logits, vocab_size, scratch);
  });
  return 0;
}

int32_t speed_score(Engine* e, const Scoring* work, char* error, int32_t bytes) {
  if (!e || !work) return refuse(error, bytes, "no engine or no rows"), 1;
  int vocab_size = e->model.vocab_size;
  if (!check_scoring(*work, vocab_size, error, bytes)) return 1;
  each_row(e, work->num_rows, [=](int row, int) { score(*work, row, vocab_size); });
  return 0;
}
