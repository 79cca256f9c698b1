#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine.h"

#ifndef LEVEL
#define LEVEL "unnamed"
#endif

static bool fail(char* error, int32_t bytes, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (error && bytes > 0) vsnprintf(error, (size_t)bytes, format, arguments);
  va_end(arguments);
  return false;
}

int32_t speed_interface(void) { return INTERFACE; }

void speed_sizes(int32_t sizes[7]) {
  const size_t all[7] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Setup), sizeof(Pass), sizeof(PackJob), sizeof(void*)};
  for (int i = 0; i < 7; i++) sizes[i] = (int32_t)all[i];
}

const char* speed_level(void) { return LEVEL; }

uint64_t speed_block_bytes(int32_t type, int32_t inputs) {
  bool known = type >= 0 && type < NUM_WEIGHT_TYPES && inputs > 0 && inputs <= MOST_INPUTS;
  return known ? block_bytes(type, inputs) : 0;
}

int32_t speed_pack(const PackJob* job) {
  bool whole = job && job->source && job->data && job->row_map && job->blocks > 0 && speed_block_bytes(job->type, job->inputs);
  if (!whole || job->source_type < FROM_FP32 || job->source_type > FROM_INT8) return 1;
  if ((job->source_type == FROM_INT8 && !job->source_scales) || (job->type == INT8 && !job->scales)) return 1;
  pack(*job);
  return 0;
}

// ---- what a model may be ---------------------------------------------------------------------------------

static bool check_range(const char* name, int64_t value, int64_t least, int64_t most, char* error, int32_t bytes) {
  if (value >= least && value <= most) return true;
  return fail(error, bytes, "%s is %lld; %lld to %lld are possible", name, (long long)value, (long long)least, (long long)most);
}

static bool check_sizes(const Model& m, char* error, int32_t bytes) {
  struct Range {
    const char* name;
    int32_t value, least, most;
  };
  const Range ranges[] = {
      {"vocab_size", m.vocab_size, 1, 1 << 24},
      {"hidden_size", m.hidden_size, 1, MOST_INPUTS / 2},
      {"intermediate_size", m.intermediate_size, 1, MOST_INPUTS},
      {"num_heads", m.num_heads, 1, 4096},
      {"num_kv_heads", m.num_kv_heads, 1, m.num_heads},
      {"head_dim", m.head_dim, 2, 1024},
      {"rotary_dim", m.rotary_dim, 2, m.head_dim},
      {"max_positions", m.max_positions, 1, 1 << 24},
      {"num_prelude_layers", m.num_prelude_layers, 0, 4096},
      {"num_block_layers", m.num_block_layers, 1, 4096},
      {"num_coda_layers", m.num_coda_layers, 0, 4096},
      {"num_loops", m.num_loops, 1, 4096},
      {"num_encoder_layers", m.num_encoder_layers, 0, 4096},
      {"low_cycles", m.low_cycles, 0, 4096},
      {"bias_distance", m.bias_distance, 0, 1 << 24},
      {"placement", m.placement, PRE, INTERPOLATION},
      {"start", m.start, FROM_NOISE, FROM_INPUT_ALONE},
      {"activation", m.activation, 0, NUM_ACTIVATIONS - 1},
      {"embedding_type", m.embedding_type, FROM_FP32, FROM_INT8},
      {"heads' channels", m.num_heads * m.head_dim, 1, MOST_INPUTS},
  };
  for (const Range& r : ranges) {
    if (!check_range(r.name, r.value, r.least, r.most, error, bytes)) return false;
  }
  if (m.head_dim % 2) return fail(error, bytes, "head_dim is %d; it must be even", m.head_dim);
  if (m.rotary_dim % 2) return fail(error, bytes, "rotary_dim is %d; it must be even", m.rotary_dim);
  if (m.num_heads % m.num_kv_heads) return fail(error, bytes, "num_heads %d is no multiple of num_kv_heads %d", m.num_heads, m.num_kv_heads);
  return true;
}

static bool check_matrix(const char* name, const Matrix& w, int inputs, int outputs, char* error, int32_t bytes) {
  int blocks = (outputs + BLOCK - 1) / BLOCK;
  if (w.type < 0 || w.type >= NUM_WEIGHT_TYPES) return fail(error, bytes, "%s has weight type %d", name, w.type);
  if (!w.data || (w.type == INT8 && !w.scales)) return fail(error, bytes, "%s has no weights", name);
  if (w.inputs == inputs && w.blocks == blocks) return true;
  return fail(error, bytes, "%s has %d inputs and %d blocks of outputs; %d and %d are wanted", name, w.inputs, w.blocks, inputs, blocks);
}

// Heads of q, k, v and of the output gate, side by side.
static int projected_heads(const Model& m) { return m.num_heads * (m.output_gate ? 2 : 1) + 2 * m.num_kv_heads; }

static bool check_scales(const Model& m, const Layer& l, char* error, int32_t bytes) {
  if (m.placement != INTERPOLATION) return !l.gate_scale || fail(error, bytes, "a scaled output gate needs interpolation");
  bool whole = l.query_scale && l.gate_scale && l.mlp_gate_scale && l.mlp_up_scale && l.attn_rate && l.mlp_rate;
  return (m.output_gate && whole) || fail(error, bytes, "a layer that interpolates has no gate or scales");
}

static bool check_layer(const Model& m, const Layer& l, char* error, int32_t bytes) {
  int heads = projected_heads(m) * m.head_dim, inner = (m.intermediate_size + BLOCK - 1) / BLOCK * BLOCK;
  if (!check_matrix("qkv", l.qkv, m.hidden_size, heads, error, bytes)) return false;
  if (!check_matrix("o", l.o, m.num_heads * m.head_dim, m.hidden_size, error, bytes)) return false;
  if (!check_matrix("gate_up", l.gate_up, m.hidden_size, m.plain_mlp ? inner : 2 * inner, error, bytes)) return false;
  if (!check_matrix("down", l.down, m.intermediate_size, m.hidden_size, error, bytes)) return false;
  if (!l.q_norm != !l.k_norm) return fail(error, bytes, "a layer has one of q_norm and k_norm");
  if (m.first_loop_gate && (!l.loop_gate_weight || !l.loop_gate_bias)) return fail(error, bytes, "a layer has no first-loop gate");
  if (!check_scales(m, l, error, bytes)) return false;
  if (l.second_rope && (!m.second_cos || !m.second_sin)) return fail(error, bytes, "a second rotary table is missing");
  if (l.windowed && m.window < 1) return fail(error, bytes, "a layer is windowed, but the window is %d", m.window);
  return true;
}

// What a layer of the block reads a source with.
static bool check_source(const Model& m, const Layer& l, char* error, int32_t bytes) {
  int heads = m.num_heads * m.head_dim, kv_heads = m.num_kv_heads * m.head_dim;
  if (!check_matrix("source_q", l.source_q, m.hidden_size, heads, error, bytes)) return false;
  if (!check_matrix("source_k", l.source_k, m.hidden_size, kv_heads, error, bytes)) return false;
  if (!check_matrix("source_v", l.source_v, m.hidden_size, kv_heads, error, bytes)) return false;
  return check_matrix("source_o", l.source_o, heads, m.hidden_size, error, bytes);
}

static int num_layers(const Model& m) {
  return m.num_prelude_layers + m.num_block_layers + m.num_coda_layers + m.num_encoder_layers;
}

static bool check_parts(const Model& m, char* error, int32_t bytes) {
  bool around = m.num_prelude_layers || m.num_coda_layers, interpolates = m.placement == INTERPOLATION;
  if (m.low_cycles && (around || m.num_block_layers % 2 || !m.low_state || m.input_injection || m.input_addition)) return fail(error, bytes, "a block of two stacks needs two halves, a low state, and nothing around it");
  if (!m.num_encoder_layers) return !m.source_bias || fail(error, bytes, "a bias for sources needs an encoder");
  if (around || interpolates || m.low_cycles || m.first_loop_gate) return fail(error, bytes, "a decoder behind an encoder is one block of layers");
  return (m.encoder_norm && m.text_bias && m.source_bias) || fail(error, bytes, "a part of the encoder is missing");
}

static bool check_model(const Model* m, char* error, int32_t bytes) {
  bool placed = m && ((m->cos && m->sin) || m->text_bias);
  if (!m || !m->layers || !m->embedding || (!m->norm && m->placement != INTERPOLATION) || !placed) return fail(error, bytes, "a part of the model is missing");
  if (m->embedding_type == FROM_INT8 && !m->embedding_scales) return fail(error, bytes, "the embedding has no scales");
  if (!check_sizes(*m, error, bytes)) return false;
  if (!check_matrix("head", m->head, m->hidden_size, m->vocab_size, error, bytes)) return false;
  if (m->input_injection && !check_matrix("adapter", m->adapter, 2 * m->hidden_size, m->hidden_size, error, bytes)) return false;
  if (!check_parts(*m, error, bytes)) return false;
  for (int i = 0; i < num_layers(*m); i++) {
    if (!check_layer(*m, m->layers[i], error, bytes)) return false;
    if (m->num_encoder_layers && i < m->num_block_layers && !check_source(*m, m->layers[i], error, bytes)) return false;
  }
  return true;
}

// ---- memory ----------------------------------------------------------------------------------------------

static Heads heads_of(const Model& m) {
  int padded = (m.head_dim + LANES - 1) / LANES * LANES;
  return {m.head_dim, padded, m.num_kv_heads, m.num_heads / m.num_kv_heads, m.attention_scale};
}

int block_caches(const Model& m) {
  return m.num_block_layers + (m.low_cycles > 1 ? m.low_cycles - 1 : 0) * (m.num_block_layers / 2);
}

size_t text_slots(const Model& m) {
  return (size_t)m.num_prelude_layers + (size_t)m.num_loops * (size_t)block_caches(m) + (size_t)m.num_coda_layers;
}

static size_t num_slots(const Model& m) { return text_slots(m) + (size_t)(m.num_encoder_layers ? m.num_block_layers : 0); }

static bool check_kv_type(int type, char* error, int32_t bytes) {
  return check_range("kv_type", type, 0, NUM_KV_TYPES - 1, error, bytes);
}

uint64_t speed_cache_bytes(const Model* m, int32_t num_pages, int32_t kv_type) {
  char ignored[8];
  if (!m || num_pages < 1 || !check_sizes(*m, ignored, sizeof ignored) || !check_kv_type(kv_type, ignored, sizeof ignored)) return 0;
  return kv_page_bytes(heads_of(*m), kv_type) * (uint64_t)num_pages * num_slots(*m);
}

static int largest(int a, int b) { return a > b ? a : b; }

static void measure(Engine* e) {
  const Model& m = e->model;
  e->heads = heads_of(m);
  e->page_bytes = kv_page_bytes(e->heads, e->setup.kv_type);
  e->slot_bytes = e->page_bytes * (size_t)e->setup.num_pages;
  e->hidden = m.hidden_size;
  e->state_size = m.hidden_size * (m.low_cycles ? 2 : 1);
  e->block_caches = block_caches(m);
  e->hidden_padded = (m.hidden_size + LANES - 1) / LANES * LANES;
  e->qkv_padded = (projected_heads(m) * m.head_dim + LANES - 1) / LANES * LANES;
  e->attended = m.num_heads * m.head_dim;
  e->inner_padded = (m.intermediate_size + LANES - 1) / LANES * LANES;
  e->widest = padded_inputs(largest(largest(m.hidden_size * 2, m.intermediate_size), e->attended));
  e->heads_are_blocks = m.head_dim % BLOCK == 0;
}

#if __has_feature(address_sanitizer)
enum { GAP = 64 };  // between pieces of memory, so that running over the end of one is noticed
extern "C" void __asan_poison_memory_region(const volatile void* from, size_t bytes);
static void forbid(const uint8_t* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
#else
enum { GAP = 0 };
static void forbid(const uint8_t*, size_t) {}
#endif

// Memory in pieces, each aligned to 64: first with `base` NULL to learn the size, then for real.
struct Cutter {
  uint8_t* base;
  size_t used;
  template <class T>
  T* cut(size_t count) {
    T* piece = base ? (T*)(base + used) : nullptr;
    size_t bytes = count * sizeof(T), next = used + (bytes + GAP + 63) / 64 * 64;
    if (base) forbid(base + used + bytes, next - used - bytes);
    used = next;
    return piece;
  }
};

static bool reserve_threads(Engine* e) {
  size_t input = input_bytes(PRIVATE_ROWS, e->widest), group = (size_t)e->heads.group * (size_t)e->heads.padded_dim;
  for (int i = 0; i < e->setup.num_threads; i++) {
    for (Cutter c = {nullptr, 0};;) {
      uint8_t* first = c.cut<uint8_t>(input);
      e->threads[i].row = c.cut<float>((size_t)e->widest);
      e->threads[i].scores = c.cut<float>(score_numbers(e->model.max_positions));
      e->threads[i].heads = c.cut<float>(2 * group);
      if (c.base) {
        e->threads[i].input = input_at(first, PRIVATE_ROWS, e->widest);
        break;
      }
      void* memory = nullptr;
      if (posix_memalign(&memory, 64, c.used)) return false;
      memset(memory, 0, c.used);
      c = {(uint8_t*)memory, 0};
      e->threads[i].input.values = nullptr;
    }
  }
  return true;
}

static void cut_rows(Engine* e, Cutter& c, int rows, int readouts) {
  size_t n = (size_t)rows;
  uint8_t* shared = c.cut<uint8_t>(input_bytes(rows, e->widest));
  if (shared) e->shared = input_at(shared, rows, e->widest);
  e->h = c.cut<float>(n * (size_t)e->hidden_padded);
  e->coda_h = c.cut<float>(n * (size_t)e->hidden_padded);
  e->sums = c.cut<float>(n * (size_t)e->hidden_padded);
  e->qkv = c.cut<float>(n * (size_t)e->qkv_padded);
  e->mixed = c.cut<float>(n * (size_t)e->attended);
  e->inner = c.cut<float>(n * (size_t)e->inner_padded);
  e->entering = c.cut<int32_t>(n);
  e->ending = c.cut<int32_t>(n);
  e->all = c.cut<int32_t>(n);
  e->coda_row = c.cut<int32_t>(n);
  e->cells = c.cut<int64_t>(n);
  e->best = c.cut<Best>((size_t)readouts * (size_t)e->head_chunks);
}

static bool reserve_rows(Engine* e, int rows, int readouts) {
  if (rows <= e->rows_capacity && readouts <= e->rows_capacity) return true;
  int wanted = largest(largest(rows, readouts), 2 * e->rows_capacity);
  Cutter size = {nullptr, 0};
  cut_rows(e, size, wanted, wanted);
  free(e->memory);
  e->memory = nullptr;
  e->rows_capacity = 0;
  if (posix_memalign(&e->memory, 64, size.used)) {
    e->memory = nullptr;
    return false;
  }
  memset(e->memory, 0, size.used);
  Cutter real = {(uint8_t*)e->memory, 0};
  cut_rows(e, real, wanted, wanted);
  e->rows_capacity = wanted;
  return true;
}

Engine* speed_open(const Model* model, const Setup* setup, char* error, int32_t bytes) {
  if (!check_model(model, error, bytes)) return nullptr;
  if (!setup || !setup->cache || !setup->states) return fail(error, bytes, "no memory is given for the cache"), nullptr;
  if (!check_range("threads", setup->num_threads, 1, MAX_THREADS, error, bytes)) return nullptr;
  if (!check_range("spin_microseconds", setup->spin_microseconds, 0, 1000000, error, bytes)) return nullptr;
  if (!check_kv_type(setup->kv_type, error, bytes)) return nullptr;
  if (!check_range("num_pages", setup->num_pages, 1, INT32_MAX / PAGE, error, bytes)) return nullptr;
  Engine* e = (Engine*)calloc(1, sizeof(Engine));
  if (!e) return fail(error, bytes, "no memory"), nullptr;
  size_t layers = sizeof(Layer) * (size_t)num_layers(*model);
  e->model = *model;
  e->setup = *setup;
  measure(e);
  e->layers = (Layer*)malloc(layers);
  e->pool = pool_open(setup->num_threads, setup->spin_microseconds);
  if (e->layers) memcpy(e->layers, model->layers, layers);
  if (e->pool) {
    int per = head_chunk_blocks(*e);
    e->head_chunks = (e->model.head.blocks + per - 1) / per;
  }
  if (e->layers && e->pool && reserve_threads(e) && reserve_rows(e, 64, 64)) return e;
  speed_close(e);
  return fail(error, bytes, "no memory or no threads are to be had for %d threads", setup->num_threads), nullptr;
}

void speed_close(Engine* e) {
  if (!e) return;
  if (e->pool) pool_close(e->pool);
  for (int i = 0; i < e->setup.num_threads; i++) free(e->threads[i].input.values);
  free(e->layers);
  free(e->memory);
  free(e);
}

// ---- a pass ----------------------------------------------------------------------------------------------

static bool check_table(const Engine& e, const Pass& p, int64_t table, int last, char* error, int32_t bytes) {
  if (!check_range("page table", table, 0, (int64_t)p.num_pages - 1 - last / PAGE, error, bytes)) return false;
  for (int i = 0; i <= last / PAGE; i++) {
    if (!check_range("page", p.pages[table + i], 0, e.setup.num_pages - 1, error, bytes)) return false;
  }
  return true;
}

static bool check_row(const Engine& e, const Pass& p, int row, char* error, int32_t bytes) {
  const Model& m = e.model;
  int position = p.positions[row], last = p.encodes ? 0 : m.num_loops - 1;
  if (!check_range("position", position, 0, m.max_positions - 1, error, bytes)) return false;
  if (!check_range("loop", p.loops[row], 0, last, error, bytes)) return false;
  if (p.loops[row] == 0 && !check_range("token", p.tokens[row], 0, m.vocab_size - 1, error, bytes)) return false;
  int seen = p.lasts ? p.lasts[row] : position;
  if (!check_range("last position", seen, position, m.max_positions - 1, error, bytes)) return false;
  if (!check_table(e, p, p.tables[row], seen, error, bytes)) return false;
  if (m.num_encoder_layers && !p.encodes) {
    if (!check_range("source's last position", p.source_lasts[row], 0, m.max_positions - 1, error, bytes)) return false;
    if (!check_table(e, p, p.source_tables[row], p.source_lasts[row], error, bytes)) return false;
  }
  return !p.noises || check_range("noise row", p.noises[row], -1, p.num_noise - 1, error, bytes);
}

static bool check_coda(const Engine& e, const Pass& p, int row, char* error, int32_t bytes) {
  return !e.model.num_coda_layers || p.ends[row] || fail(error, bytes, "row %d is read out but runs no coda", row);
}

static bool check_pass(const Engine& e, const Pass& p, char* error, int32_t bytes) {
  if (!p.positions || !p.loops || !p.tokens || !p.tables || !p.pages || (e.model.num_coda_layers && !p.ends)) return fail(error, bytes, "rows are missing");
  if (!check_range("rows", p.num_rows, 1, MOST_ROWS, error, bytes) || !check_range("readouts", p.num_readouts, 0, MAX_CHUNKS, error, bytes)) return false;
  if (p.encodes && (!e.model.num_encoder_layers || !p.lasts || p.num_readouts)) return fail(error, bytes, "a pass encodes without an encoder, or reads out");
  if (e.model.num_encoder_layers && !p.encodes && (!p.source_tables || !p.source_lasts)) return fail(error, bytes, "sources are missing");
  if (p.num_readouts && (!p.readouts || !p.logit_rows || !p.tokens_out)) return fail(error, bytes, "readouts are missing");
  if (!check_range("kept", p.num_kept, 0, MAX_CHUNKS, error, bytes) || !check_range("given", p.num_given, 0, MAX_CHUNKS, error, bytes)) return false;
  if ((p.num_kept && (!p.kept || !p.kept_out)) || (p.num_given && !p.given)) return fail(error, bytes, "inputs of the head are missing");
  for (int row = 0; row < p.num_rows; row++) {
    if (!check_row(e, p, row, error, bytes)) return false;
  }
  for (int i = 0; i < p.num_readouts; i++) {
    if (!check_range("readout", p.readouts[i], 0, p.num_rows + p.num_given - 1, error, bytes)) return false;
    if (p.readouts[i] < p.num_rows && !check_coda(e, p, p.readouts[i], error, bytes)) return false;
    if (!check_range("logits row", p.logit_rows[i], -1, p.logits ? p.num_logits - 1 : -1, error, bytes)) return false;
  }
  for (int i = 0; i < p.num_kept; i++) {
    if (!check_range("kept row", p.kept[i], 0, p.num_rows - 1, error, bytes) || !check_coda(e, p, p.kept[i], error, bytes)) return false;
  }
  return true;
}

static void sort_rows(Engine* e, const Pass& p) {
  e->num_entering = e->num_ending = 0;
  for (int row = 0; row < p.num_rows; row++) {
    int position = p.positions[row];
    e->cells[row] = (int64_t)p.pages[p.tables[row] + position / PAGE] * PAGE + position % PAGE;
    e->all[row] = row;
    if (p.loops[row] == 0) e->entering[e->num_entering++] = row;
    if (e->model.num_coda_layers && p.ends[row]) {
      e->coda_row[row] = e->num_ending;
      e->ending[e->num_ending++] = row;
    }
  }
}

static void choose_tokens(const Engine& e, const Pass& p) {
  for (int i = 0; i < p.num_readouts; i++) {
    Best best = e.best[i];
    for (int chunk = 1; chunk < e.head_chunks; chunk++) {
      Best other = e.best[(size_t)chunk * (size_t)p.num_readouts + (size_t)i];
      if (other.value > best.value) best = other;
    }
    p.tokens_out[i] = best.token;
  }
}

int32_t speed_run(Engine* e, const Pass* pass, char* error, int32_t bytes) {
  if (!e || !pass) return fail(error, bytes, "no engine or no rows"), 1;
  if (!check_pass(*e, *pass, error, bytes)) return 1;
  if (!reserve_rows(e, pass->num_rows, pass->num_readouts)) return fail(error, bytes, "no memory for %d rows", pass->num_rows), 1;
  sort_rows(e, *pass);
  e->pass = pass;
  pool_run(e->pool, run_program, e);
  choose_tokens(*e, *pass);
  return 0;
}

// ---- measuring -------------------------------------------------------------------------------------------

void speed_times(Engine* e, int64_t nanoseconds[NUM_PARTS]) {
  memcpy(nanoseconds, e->times, sizeof e->times);
  memset(e->times, 0, sizeof e->times);
}

uint64_t speed_stream(const void* memory, uint64_t bytes) {
  typedef uint64_t u64x8 __attribute__((ext_vector_type(8)));
  const uint8_t* from = (const uint8_t*)memory;
  u64x8 first = 0, second = 0;
  for (uint64_t at = 0; at + 128 <= bytes; at += 128) {
    first += load<u64x8>(from + at);
    second += load<u64x8>(from + at + 64);
  }
  first += second;
  uint64_t sum = 0;
  for (int i = 0; i < 8; i++) sum += first[i];
  return sum;
}
