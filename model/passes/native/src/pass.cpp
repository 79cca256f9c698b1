#include "engine.h"

// ---- rows ------------------------------------------------------------------------------------------------

static void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
  f32x16 squares = splat(0);
  int i = 0;
  for (; i + LANES <= size; i += LANES) {
    f32x16 v = load<f32x16>(x + i);
    squares = fma16(v, v, squares);
  }
  if (i < size) {
    f32x16 v = splat(0);
    memcpy(&v, x + i, (size_t)(size - i) * 4);
    squares = fma16(v, v, squares);
  }
  float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)size + eps);
  for (i = 0; i + LANES <= size; i += LANES) {
    store(out + i, load<f32x16>(x + i) * scale * load<f32x16>(weight + i));
  }
  for (; i < size; i++) out[i] = x[i] * scale * weight[i];
}

static f32x16 load_some(const float* from, int count) {  // 16 or fewer, zeros behind them
  if (count >= LANES) return load<f32x16>(from);
  f32x16 v = splat(0);
  memcpy(&v, from, (size_t)count * 4);
  return v;
}

static void store_some(float* to, f32x16 v, int count) { memcpy(to, &v, (size_t)(count < LANES ? count : LANES) * 4); }

static void unit_norm(const float* x, int size, float eps, float* out) {
  f32x16 squares = splat(0);
  for (int i = 0; i < size; i += LANES) {
    f32x16 v = load_some(x + i, size - i);
    squares = fma16(v, v, squares);
  }
  float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) + eps);
  for (int i = 0; i < size; i++) out[i] = x[i] * scale;
}

// h + rate * (out - h)
static void step_towards(float* h, const float* out, const float* rate, int size) {
  for (int i = 0; i < size; i++) h[i] += rate[i] * (out[i] - h[i]);
}

static void add_to(float* to, const float* x, int size) {
  for (int i = 0; i < size; i++) to[i] += x[i];
}

static void rotate(const Model& m, bool second, int position, float* head) {
  int half = m.rotary_dim / 2;
  size_t at = (size_t)position * (size_t)half;
  const float *cos = (second ? m.second_cos : m.cos) + at, *sin = (second ? m.second_sin : m.sin) + at;
  int step = m.interleaved ? 2 : 1, apart = m.interleaved ? 1 : half;
  for (int i = 0; i < half; i++) {
    float a = head[i * step], b = head[i * step + apart];
    head[i * step] = a * cos[i] - b * sin[i];
    head[i * step + apart] = b * cos[i] + a * sin[i];
  }
}

static void look_up(const Model& m, int token, float* out) {
  size_t first = (size_t)token * (size_t)m.hidden_size;
  for (int i = 0; i < m.hidden_size; i++) {
    size_t at = first + (size_t)i;
    float x = 0;
    switch (m.embedding_type) {
      case FROM_FP32:
        x = ((const float*)m.embedding)[at];
        break;
      case FROM_BF16:
        x = bf16_to_float(((const uint16_t*)m.embedding)[at]);
        break;
      case FROM_FP16:
        x = half_to_float(((const uint16_t*)m.embedding)[at]);
        break;
      default:
        x = (float)((const int8_t*)m.embedding)[at] * m.embedding_scales[token];
    }
    out[i] = x * m.embedding_scale;
  }
}

// ---- one thread's way through a pass ---------------------------------------------------------------------

namespace {

enum { BYTES_AHEAD_OF_A_STAGE = 16384, FETCHING_TASKS = 64 };

struct RowSet {  // rows that go through layers together
  int count;
  const int32_t* rows;  // their numbers in the pass
  float* h;             // (count, hidden_padded)
};

struct Step {
  Worker* self;
  Engine& e;
  const Model& m;
  const Pass& p;
  Private& mine;
  int64_t since;   // nanoseconds; what follows is another part
  int behind = 0;  // slots between the block's layers and their K/V, which earlier cycles have taken

  void mark(Part part) {
    if (self->index) return;
    int64_t now = nanoseconds();
    e.times[part] += now - since;
    since = now;
  }

  bool keeps_input() const { return m.input_injection || m.input_addition; }

  float* state(int row) const { return e.setup.states + e.cells[row] * e.state_size; }
  float* entered(int row) const {
    if (!keeps_input()) return state(row);
    return e.setup.states + (int64_t)e.setup.num_pages * PAGE * e.state_size + e.cells[row] * m.hidden_size;
  }

  int per_chunk(int units) const {
    int chunks = pool_threads(self->pool) * 12;
    return (units + chunks - 1) / chunks;
  }

  template <class Work>
  void each(int count, Work work) {  // one stage over single items
    int per = count > MAX_CHUNKS ? (count + MAX_CHUNKS - 1) / MAX_CHUNKS : 1;
    run_stage(self, (count + per - 1) / per, [&](int chunk) {
      for (int i = chunk * per; i < count && i < (chunk + 1) * per; i++) work(i);
    });
  }

  // The product of `rows` rows. `fill(row, scratch)` gives a row of the input, `emit(row, block, values, chunk)`
  // takes 16 outputs, `after(unit)` follows when all rows of `unit_blocks` blocks are done.
  template <class Fill, class Emit, class After>
  void product(const Matrix& w, int rows, int unit_blocks, int per, Fill fill, Emit emit, After after) {
    if (!rows) return;
    bool alone = rows <= PRIVATE_ROWS;
    const Input& in = alone ? mine.input : e.shared;
    auto ready = [&](int row) { encode(in, row, w.type, fill(row, mine.row), w.inputs); };
    if (!alone) each(rows, ready);
    int units = w.blocks / unit_blocks;
    auto prepare = [&] {
      fetch(w, share_begin(units, per) * unit_blocks, BYTES_AHEAD_OF_A_STAGE);
      for (int row = 0; alone && row < rows; row++) ready(row);
    };
    run_stage(self, (units + per - 1) / per, prepare, [&](int chunk) {
      for (int unit = chunk * per; unit < units && unit < (chunk + 1) * per; unit++) {
        for (int block = unit * unit_blocks; block < (unit + 1) * unit_blocks; block++) {
          multiply_all(w, block, in, rows, [&](int row, f32x16 v) { emit(row, block, v, chunk); });
        }
        after(unit);
      }
    });
  }

  // The first unit of this thread's share of a stage.
  int share_begin(int units, int per) const {
    return (units + per - 1) / per * self->index / pool_threads(self->pool) * per;
  }

  // Has weights brought into the second cache, from the start of a block on, while there is other work to do.
  void fetch(const Matrix& w, int block, size_t bytes) const {
    size_t begin = (size_t)block * block_bytes(w.type, w.inputs), end = (size_t)w.blocks * block_bytes(w.type, w.inputs);
    for (size_t at = begin; at < end && at < begin + bytes; at += 64) __builtin_prefetch(w.data + at, 0, 2);
  }

  template <class Fill, class Emit>
  void product(const Matrix& w, int rows, int unit_blocks, Fill fill, Emit emit) {
    product(w, rows, unit_blocks, per_chunk(w.blocks / unit_blocks), fill, emit, [](int) {});
  }

  template <class Take>
  void multiply_all(const Matrix& w, int block, const Input& in, int rows, Take take) {
    alignas(64) float out[MOST_TILE_ROWS * BLOCK];
    int tiles = (rows + MOST_TILE_ROWS - 1) / MOST_TILE_ROWS;
    for (int tile = 0; tile < tiles; tile++) {
      int first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      multiply(w, block, in, first, count, out);
      for (int r = 0; r < count; r++) take(first + r, load<f32x16>(out + r * BLOCK));
    }
  }

  const float* normed(const float* x, const float* weight, float* scratch) {
    if (!weight) return x;
    rms_norm(x, weight, m.hidden_size, m.norm_eps, scratch);
    return scratch;
  }

  // ---- attention -----------------------------------------------------------------------------------------

  uint8_t* slot(int layer, int loop) const {
    int before = m.num_prelude_layers + m.num_block_layers;
    int64_t index = layer;
    if (is_encoder(layer)) return source_slot(0);  // which nothing is written to until the encoder is done
    if (is_block(layer)) index += behind + (int64_t)loop * e.block_caches;
    if (layer >= before) index += (int64_t)m.num_loops * e.block_caches - m.num_block_layers;
    return (uint8_t*)e.setup.cache + (size_t)index * e.slot_bytes;
  }

  // Of a layer of the block: what it makes of sources is the same in every loop.
  uint8_t* source_slot(int layer) const {
    return (uint8_t*)e.setup.cache + (text_slots(m) + (size_t)layer) * e.slot_bytes;
  }

  bool is_encoder(int layer) const { return layer >= m.num_prelude_layers + m.num_block_layers + m.num_coda_layers; }

  bool is_block(int layer) const {
    return layer >= m.num_prelude_layers && layer < m.num_prelude_layers + m.num_block_layers;
  }

  int loop_of(int layer, int row) const { return is_block(layer) ? p.loops[row] : 0; }

  // Bias, rotation and storing of one head of q, k or v: heads of q first, then of k, then of v.
  void finish_head(int layer, const RowSet& set, int i, int head) {
    const Layer& l = e.layers[layer];
    int row = set.rows[i], position = p.positions[row], kv_heads = m.num_kv_heads, kv_head = head - m.num_heads;
    float* x = e.qkv + (size_t)i * (size_t)e.qkv_padded + (size_t)head * (size_t)m.head_dim;
    bool is_value = kv_head >= kv_heads;
    if (!is_value) {
      if (l.qk_bias) add_to(x, l.qk_bias + (size_t)head * (size_t)m.head_dim, m.head_dim);
      if (m.cos) rotate(m, l.second_rope, position, x);
      if (l.query_scale) unit_norm(x, m.head_dim, m.norm_eps, x);
      if (l.query_scale && kv_head < 0) {
        const float* scale = l.query_scale + (size_t)head * (size_t)m.head_dim;
        for (int c = 0; c < m.head_dim; c++) x[c] *= scale[c];
      }
    }
    if (kv_head < 0) return;
    uint8_t* page = page_of(slot(layer, loop_of(layer, row)), row);
    int type = e.setup.kv_type;
    if (is_value) {
      write_value(e.heads, page, type, kv_head - kv_heads, position % PAGE, x);
    } else {
      write_key(e.heads, page, type, kv_head, position % PAGE, x);
    }
  }

  uint8_t* page_of(uint8_t* slot, int row) const {
    return slot + (size_t)p.pages[p.tables[row] + p.positions[row] / PAGE] * e.page_bytes;
  }

  float* projected(int i) const { return e.qkv + (size_t)i * (size_t)e.qkv_padded; }

  void finish_heads(int layer, const RowSet& set, int i) {
    const Layer& l = e.layers[layer];
    int q_size = m.num_heads * m.head_dim, k_size = m.num_kv_heads * m.head_dim;
    float* q = e.qkv + (size_t)i * (size_t)e.qkv_padded;
    if (l.q_norm) {
      rms_norm(q, l.q_norm, q_size, m.norm_eps, q);
      rms_norm(q + q_size, l.k_norm, k_size, m.norm_eps, q + q_size);
    }
    for (int head = 0; head < m.num_heads + 2 * m.num_kv_heads; head++) finish_head(layer, set, i, head);
  }

  void project_qkv(int layer, const RowSet& set) {
    const Layer& l = e.layers[layer];
    auto fill = [&](int i, float* scratch) { return normed(set.h + (size_t)i * (size_t)e.hidden_padded, l.attn_norm, scratch); };
    auto emit = [&](int i, int block, f32x16 v, int) { store(projected(i) + block * BLOCK, v); };
    if (e.heads_are_blocks && !l.q_norm) {
      auto after = [&](int head) {
        if (head >= m.num_heads + 2 * m.num_kv_heads) return;  // the output gate's
        for (int i = 0; i < set.count; i++) finish_head(layer, set, i, head);
      };
      int unit = m.head_dim / BLOCK;
      product(l.qkv, set.count, unit, per_chunk(l.qkv.blocks / unit), fill, emit, after);
    } else {
      product(l.qkv, set.count, 1, fill, emit);
      each(set.count, [&](int i) { finish_heads(layer, set, i); });
    }
  }

  // Of the heads that share a K/V head.
  const float* queries(int i, int kv_head) const { return projected(i) + (size_t)(kv_head * e.heads.group) * (size_t)m.head_dim; }
  float* mixed(int i, int head) const { return e.mixed + (size_t)i * (size_t)e.attended + (size_t)head * (size_t)m.head_dim; }

  void attend_row(int layer, const RowSet& set, int i, int kv_head) {
    const Layer& l = e.layers[layer];
    int row = set.rows[i], loop = loop_of(layer, row), position = p.positions[row], group = e.heads.group;
    int last = p.lasts ? p.lasts[row] : position;
    const float* q = queries(i, kv_head);
    bool gated = m.first_loop_gate && is_block(layer) && loop > 0;
    bool windowed = l.windowed && !(m.first_loop_gate && loop == 0);
    int first = windowed && position >= m.window ? position - m.window + 1 : 0;
    const float* bias = is_encoder(layer) ? m.source_bias : m.text_bias;
    Span span = {slot(layer, loop), e.page_bytes, p.pages + p.tables[row], first, last, bias, m.bias_distance, position};
    float *own = mine.heads, *whole = own + group * e.heads.padded_dim;
    attend(e.heads, span, e.setup.kv_type, kv_head, q, mine.scores, own);
    if (gated) {
      Span everything = {slot(layer, 0), e.page_bytes, span.pages, 0, last, bias, m.bias_distance, position};
      attend(e.heads, everything, e.setup.kv_type, kv_head, q, mine.scores, whole);
    }
    for (int g = 0; g < group; g++) {
      int head = kv_head * group + g;
      float* to = mixed(i, head);
      const float *a = own + g * e.heads.padded_dim, *b = whole + g * e.heads.padded_dim;
      float share = gated ? first_loop_share(l, head, q + g * m.head_dim) : 0;
      for (int c = 0; c < m.head_dim; c++) to[c] = gated ? a[c] + share * (b[c] - a[c]) : a[c];
    }
  }

  float first_loop_share(const Layer& l, int head, const float* q) const {
    const float* w = l.loop_gate_weight + (size_t)head * (size_t)m.head_dim;
    float dot = 0;
    for (int c = 0; c < m.head_dim; c++) dot += q[c] * w[c];
    return sigmoid16(splat(dot + l.loop_gate_bias[head]))[0];
  }

  // ---- a layer -------------------------------------------------------------------------------------------

  // A sub-layer's last product, added to h where nothing stands between; else kept for `join`.
  void close(const Matrix& w, const RowSet& set, const float* from, int stride) {
    close(w, set, [=](int i, float*) { return from + (size_t)i * (size_t)stride; });
  }

  template <class Fill>
  void close(const Matrix& w, const RowSet& set, Fill fill) {
    bool direct = m.placement == PRE;
    float* to = direct ? set.h : e.sums;
    product(w, set.count, 1, fill, [=, this](int i, int block, f32x16 v, int) {
      float* at = to + (size_t)i * (size_t)e.hidden_padded + block * BLOCK;
      store(at, direct ? load<f32x16>(at) + v : v);
    });
  }

  void join(const RowSet& set, const float* out_norm, const float* sum_norm) {
    if (m.placement == PRE) return;
    each(set.count, [&](int i) {
      float* h = set.h + (size_t)i * (size_t)e.hidden_padded;
      add_to(h, normed(e.sums + (size_t)i * (size_t)e.hidden_padded, out_norm, mine.row), m.hidden_size);
      if (sum_norm) rms_norm(h, sum_norm, m.hidden_size, m.norm_eps, h);
    });
  }

  void attend_rows(int index, const RowSet& set) {
    over_heads(e.layers[index].o, set, [&](int i, int kv_head) { attend_row(index, set, i, kv_head); });
  }

  // Attention of each row and K/V head; `next` is the matrix that is wanted then.
  template <class Work>
  void over_heads(const Matrix& next, const RowSet& set, Work work) {
    int tasks = set.count * m.num_kv_heads;
    each(tasks, [&](int task) {
      if (tasks <= FETCHING_TASKS) {
        int begin = next.blocks * task / tasks, end = next.blocks * (task + 1) / tasks;
        fetch(next, begin, (size_t)(end - begin) * block_bytes(next.type, next.inputs));
      }
      work(task % set.count, task / set.count);
    });
    mark(ATTENTION);
  }

  // ---- what an encoder made of a source ------------------------------------------------------------------

  void attend_source(int index, const RowSet& set, int i, int kv_head) {
    int row = set.rows[i], group = e.heads.group;
    Span span = {source_slot(index), e.page_bytes, p.pages + p.source_tables[row], 0, p.source_lasts[row], nullptr, 0, 0};
    attend(e.heads, span, e.setup.kv_type, kv_head, queries(i, kv_head), mine.scores, mine.heads);
    for (int g = 0; g < group; g++) {
      memcpy(mixed(i, kv_head * group + g), mine.heads + g * e.heads.padded_dim, (size_t)m.head_dim * 4);
    }
  }

  void read_source(int index, const RowSet& set) {
    const Layer& l = e.layers[index];
    auto fill = [&](int i, float* scratch) { return normed(set.h + (size_t)i * (size_t)e.hidden_padded, l.source_norm, scratch); };
    product(l.source_q, set.count, 1, fill, [&](int i, int block, f32x16 v, int) { store(projected(i) + block * BLOCK, v); });
    mark(QKV);
    over_heads(l.source_o, set, [&](int i, int kv_head) { attend_source(index, set, i, kv_head); });
    close(l.source_o, set, e.mixed, e.attended);
    mark(OUT);
    join(set, nullptr, nullptr);
    mark(JOIN);
  }

  // Keys or values of the encoder's outputs for a layer of the decoder.
  void store_source(int index, const RowSet& set, const Matrix& w, decltype(&write_key) write) {
    auto fill = [&](int i, float*) { return (const float*)set.h + (size_t)i * (size_t)e.hidden_padded; };
    product(w, set.count, 1, fill, [&](int i, int block, f32x16 v, int) { store(projected(i) + block * BLOCK, v); });
    each(set.count, [&](int i) {
      int row = set.rows[i];
      uint8_t* page = page_of(source_slot(index), row);
      for (int head = 0; head < m.num_kv_heads; head++) {
        write(e.heads, page, e.setup.kv_type, head, p.positions[row] % PAGE, projected(i) + head * m.head_dim);
      }
    });
    mark(QKV);
  }

  void encode_sources() {
    RowSet set = {p.num_rows, e.all, e.h};
    each(set.count, [&](int row) { look_up(m, p.tokens[row], set.h + (size_t)row * (size_t)e.hidden_padded); });
    mark(ENTER);
    layers(m.num_prelude_layers + m.num_block_layers + m.num_coda_layers, m.num_encoder_layers, set);
    each(set.count, [&](int row) {
      float* h = set.h + (size_t)row * (size_t)e.hidden_padded;
      rms_norm(h, m.encoder_norm, m.hidden_size, m.norm_eps, h);
    });
    mark(JOIN);
    for (int index = 0; index < m.num_block_layers; index++) {
      store_source(index, set, e.layers[index].source_k, write_key);
      store_source(index, set, e.layers[index].source_v, write_value);
    }
  }

  // ---- a layer of unit vectors ---------------------------------------------------------------------------

  // Attention's output of a row, gated; of unit length in a layer of unit vectors, whose gate is scaled.
  const float* gated(const Layer& l, int i, float* scratch) {
    const float* out = e.mixed + (size_t)i * (size_t)e.attended;
    const float* gate = e.qkv + (size_t)i * (size_t)e.qkv_padded + (size_t)((m.num_heads + 2 * m.num_kv_heads) * m.head_dim);
    for (int c = 0; c < e.attended; c += LANES) {
      int count = e.attended - c;
      f32x16 logit = load_some(gate + c, count);
      f32x16 share = sigmoid16(l.gate_scale ? logit * load_some(l.gate_scale + c, count) : logit);
      store_some(scratch + c, load_some(out + c, count) * share, count);
    }
    if (l.gate_scale) unit_norm(scratch, e.attended, m.norm_eps, scratch);
    return scratch;
  }

  void unit_rows(const RowSet& set) {
    each(set.count, [&](int i) {
      float* h = set.h + (size_t)i * (size_t)e.hidden_padded;
      unit_norm(h, m.hidden_size, m.norm_eps, h);
    });
  }

  // The step of all rows towards their `sums`; what follows a step inside of a layer is of unit length.
  void step(const RowSet& set, const float* rate, bool unit) {
    each(set.count, [&](int i) {
      float *h = set.h + (size_t)i * (size_t)e.hidden_padded, *out = e.sums + (size_t)i * (size_t)e.hidden_padded;
      unit_norm(out, m.hidden_size, m.norm_eps, out);
      step_towards(h, out, rate, m.hidden_size);
      if (unit) unit_norm(h, m.hidden_size, m.norm_eps, h);
    });
    mark(JOIN);
  }

  void unit_layer(int index, const RowSet& set) {
    const Layer& l = e.layers[index];
    unit_rows(set);
    mark(JOIN);
    project_qkv(index, set);
    mark(QKV);
    attend_rows(index, set);
    close(l.o, set, [&](int i, float* scratch) { return gated(l, i, scratch); });
    mark(OUT);
    step(set, l.attn_rate, true);
    auto fill = [&](int i, float*) { return (const float*)set.h + (size_t)i * (size_t)e.hidden_padded; };
    product(l.gate_up, set.count, 2, fill, [&](int i, int block, f32x16 v, int) {
      float* at = e.inner + (size_t)i * (size_t)e.inner_padded + block / 2 * BLOCK;
      f32x16 scaled = v * load<f32x16>((block % 2 ? l.mlp_up_scale : l.mlp_gate_scale) + block / 2 * BLOCK);
      store(at, block % 2 ? activate(m.activation, load<f32x16>(at)) * scaled : scaled);
    });
    mark(GATE_UP);
    close(l.down, set, [&](int i, float* scratch) {
      unit_norm(e.inner + (size_t)i * (size_t)e.inner_padded, m.intermediate_size, m.norm_eps, scratch);
      return (const float*)scratch;
    });
    mark(DOWN);
    step(set, l.mlp_rate, false);
  }

  // ---- a layer of any other kind -------------------------------------------------------------------------

  void layer(int index, const RowSet& set) {
    const Layer& l = e.layers[index];
    if (!set.count) return;
    if (m.placement == INTERPOLATION) return unit_layer(index, set);
    project_qkv(index, set);
    mark(QKV);
    attend_rows(index, set);
    if (m.output_gate) {
      close(l.o, set, [&](int i, float* scratch) { return gated(l, i, scratch); });
    } else {
      close(l.o, set, e.mixed, e.attended);
    }
    mark(OUT);
    join(set, l.attn_out_norm, l.attn_sum_norm);
    mark(JOIN);
    if (l.source_q.data) read_source(index, set);
    fill_inner(l, set);
    mark(GATE_UP);
    close(l.down, set, e.inner, e.inner_padded);
    mark(DOWN);
    join(set, l.mlp_out_norm, l.mlp_sum_norm);
    mark(JOIN);
  }

  void fill_inner(const Layer& l, const RowSet& set) {
    auto fill = [&](int i, float* scratch) { return normed(set.h + (size_t)i * (size_t)e.hidden_padded, l.mlp_norm, scratch); };
    auto inner = [&](int i, int block) { return e.inner + (size_t)i * (size_t)e.inner_padded + block * BLOCK; };
    if (m.plain_mlp) {
      product(l.gate_up, set.count, 1, fill, [&](int i, int block, f32x16 v, int) { store(inner(i, block), activate(m.activation, v)); });
      return;
    }
    product(l.gate_up, set.count, 2, fill, [&](int i, int block, f32x16 v, int) {
      float* at = inner(i, block / 2);
      store(at, block % 2 ? activate(m.activation, load<f32x16>(at)) * v : v);
    });
  }

  void layers(int first, int count, const RowSet& set) {
    for (int index = first; index < first + count; index++) layer(index, set);
  }

  // ---- a pass --------------------------------------------------------------------------------------------

  void enter() {
    RowSet set = {e.num_entering, e.entering, e.h};
    if (!set.count) return;
    each(set.count, [&](int i) { look_up(m, p.tokens[set.rows[i]], set.h + (size_t)i * (size_t)e.hidden_padded); });
    mark(ENTER);
    layers(0, m.num_prelude_layers, set);
    if (m.norm_after_prelude) unit_rows(set);
    each(set.count, [&](int i) {
      int row = set.rows[i];
      size_t bytes = (size_t)m.hidden_size * 4;
      const float* h = set.h + (size_t)i * (size_t)e.hidden_padded;
      memcpy(entered(row), h, bytes);
      if (m.low_cycles) memcpy(state(row) + m.hidden_size, m.low_state, bytes);
      if (!keeps_input()) return;
      int noise = p.noises ? p.noises[row] : -1;
      if (noise >= 0) {
        memcpy(state(row), p.noise + (size_t)noise * (size_t)m.hidden_size, bytes);
      } else if (m.start == FROM_NOISE) {
        memset(state(row), 0, bytes);
      } else {
        memcpy(state(row), h, bytes);
      }
    });
    mark(ENTER);
  }

  void mix_in() {  // the block's input: the state, through the adapter where there is one
    if (!m.input_injection) {
      each(p.num_rows, [&](int row) {
        float* h = e.h + (size_t)row * (size_t)e.hidden_padded;
        memcpy(h, state(row), (size_t)m.hidden_size * 4);
        if (m.input_addition) add_to(h, entered(row), m.hidden_size);
      });
      return;
    }
    auto fill = [&](int row, float* scratch) {
      memcpy(scratch, state(row), (size_t)m.hidden_size * 4);
      memcpy(scratch + m.hidden_size, entered(row), (size_t)m.hidden_size * 4);
      return scratch;
    };
    product(m.adapter, p.num_rows, 1, fill, [&](int row, int block, f32x16 v, int) {
      float* to = e.h + (size_t)row * (size_t)e.hidden_padded + block * BLOCK;
      bool alone = m.start == FROM_INPUT_ALONE && p.loops[row] == 0;
      int count = m.hidden_size - block * BLOCK;
      store(to, v);
      if (alone) memcpy(to, entered(row) + block * BLOCK, (size_t)(count < BLOCK ? count : BLOCK) * 4);
    });
  }

  void close_loop(float* h) {
    if (m.placement == INTERPOLATION) {
      unit_norm(h, m.hidden_size, m.norm_eps, h);
    } else {
      rms_norm(h, m.norm, m.hidden_size, m.norm_eps, h);
    }
  }

  // A loop of two stacks: the low state is kept behind the high one.
  void loop_stacks() {
    int size = m.num_block_layers / 2;
    RowSet set = {p.num_rows, e.all, e.h};
    auto of_rows = [&](auto work) {
      each(p.num_rows, [&](int row) { work(e.h + (size_t)row * (size_t)e.hidden_padded, state(row), state(row) + m.hidden_size); });
      mark(JOIN);
    };
    size_t bytes = (size_t)m.hidden_size * 4;
    of_rows([&](float* h, const float* high, const float* low) {
      memcpy(h, low, bytes);
      add_to(h, high, m.hidden_size);
    });
    for (int cycle = 0; cycle < m.low_cycles; cycle++) {
      behind = cycle * size;
      layers(0, size, set);
      of_rows([&](float* h, const float* high, float* low) {
        close_loop(h);
        memcpy(low, h, bytes);
        add_to(h, high, m.hidden_size);
      });
    }
    layers(size, size, set);
    of_rows([&](float* h, float* high, const float*) {
      close_loop(h);
      memcpy(high, h, bytes);
    });
  }

  void loop() {
    if (m.low_cycles) return loop_stacks();
    mix_in();
    mark(MIX_IN);
    layers(m.num_prelude_layers, m.num_block_layers, {p.num_rows, e.all, e.h});
    each(p.num_rows, [&](int row) {
      float* h = e.h + (size_t)row * (size_t)e.hidden_padded;
      if (m.norm_after_loop) close_loop(h);
      memcpy(state(row), h, (size_t)m.hidden_size * 4);
      if (!m.num_coda_layers || !p.ends[row]) return;
      float* to = e.coda_h + (size_t)e.coda_row[row] * (size_t)e.hidden_padded;
      memcpy(to, h, (size_t)e.hidden_padded * 4);
      if (m.norm_before_coda) rms_norm(h, m.norm, m.hidden_size, m.norm_eps, to);
    });
    mark(JOIN);
  }

  const float* head_input(int row, float* scratch) {
    const float* h = m.num_coda_layers ? e.coda_h + (size_t)e.coda_row[row] * (size_t)e.hidden_padded
                                       : e.h + (size_t)row * (size_t)e.hidden_padded;
    if (m.placement == INTERPOLATION) {
      unit_norm(h, m.hidden_size, m.norm_eps, scratch);
      return scratch;
    }
    return normed(h, m.norm_after_loop && !m.num_coda_layers ? nullptr : m.norm, scratch);
  }

  void read_out() {
    layers(m.num_prelude_layers + m.num_block_layers, m.num_coda_layers, {e.num_ending, e.ending, e.coda_h});
    if (p.num_kept) {
      each(p.num_kept, [&](int i) {
        memcpy(p.kept_out + (size_t)i * (size_t)m.hidden_size, head_input(p.kept[i], mine.row), (size_t)m.hidden_size * 4);
      });
    }
    auto fill = [&](int i, float* scratch) {
      int row = p.readouts[i], given = row - p.num_rows;
      return given < 0 ? head_input(row, scratch) : p.given + (size_t)given * (size_t)m.hidden_size;
    };
    int per = head_chunk_blocks(e);
    auto emit = [&](int i, int block, f32x16 v, int chunk) { note(i, block, v, chunk, block == chunk * per); };
    product(m.head, p.num_readouts, 1, per, fill, emit, [](int) {});
    mark(HEAD);
  }

  void note(int i, int block, f32x16 v, int chunk, bool is_first) {
    Best* best = e.best + (size_t)chunk * (size_t)p.num_readouts + i;
    int count = m.vocab_size - block * BLOCK;
    if (count > BLOCK) count = BLOCK;
    if (m.logit_scale) v = v * load<f32x16>(m.logit_scale + block * BLOCK);
    if (p.logit_rows[i] >= 0) {
      memcpy(p.logits + (size_t)p.logit_rows[i] * (size_t)m.vocab_size + block * BLOCK, &v, (size_t)count * 4);
    }
    if (is_first) *best = {v[0], block * BLOCK};
    f32x16 nothing = v - v;
    if (sum_lanes(nothing) != 0.0f) *best = {__builtin_inff(), NO_TOKEN};
    float top = count == BLOCK ? max_lanes(v) : best->value;
    if (count == BLOCK && !(top > best->value)) return;
    for (int lane = 0; lane < count; lane++) {
      if (v[lane] > best->value) *best = {v[lane], block * BLOCK + lane};
    }
  }
};

}  // namespace

int head_chunk_blocks(const Engine& e) {
  int chunks = pool_threads(e.pool) * 12;
  return (e.model.head.blocks + chunks - 1) / chunks;
}

void run_program(Worker* self, void* context) {
  Engine& e = *(Engine*)context;
  Step step = {self, e, e.model, *e.pass, e.threads[self->index], nanoseconds()};
  if (e.pass->encodes) return step.encode_sources();
  step.enter();
  step.loop();
  step.read_out();
}
