"""The families' forward passes in float64 numpy, token by token where it is simplest: slow, for tests.

Written from the papers' and the references' maths alone; shares no code, no table of names and no config
with the package. Weights are a dict of the names on disk, configs are the content of a config.json.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tests.loose import Json

Array = NDArray[np.float64]
Weights = dict[str, Array]
Shapes = dict[str, tuple[int, ...]]


def random_weights(shapes: Shapes, seed: int) -> Weights:
    """Norms near 1, biases near 0, matrices that keep the size of what they multiply; fp32 numbers."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        if "norm" in name or "ln_f" in name:
            values = 1 + 0.3 * noise
        else:
            values = noise / np.sqrt(shape[-1]) if len(shape) > 1 else 0.5 * noise
        weights[name] = values.astype(np.float32).astype(np.float64)
    return weights


def rms(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return normed


def silu(x: Array) -> Array:
    gated: Array = x / (1 + np.exp(-x))
    return gated


def rotate(x: Array, frequencies: Array, scale: float, interleaved: bool) -> Array:
    """x (tokens, heads, dim) by position times frequency, as complex numbers."""
    half = x.shape[-1] // 2
    turn = scale * np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    if interleaved:
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((z.real, z.imag), -1).reshape(x.shape)
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate((z.real, z.imag), -1)


def attend(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """q (tokens, heads, dim), k and v (tokens, groups, dim); a token sees `window` tokens up to itself."""
    out = np.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for token in range(len(q)):
        first = 0 if window is None else max(0, token - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : token + 1, head // share], v[first : token + 1, head // share]
            scores = keys @ q[token, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[token, head] = weights @ values / weights.sum()
    return out


class Stack:
    """Llama's projections under one layer's name, with whatever the family does around them."""

    def __init__(self, raw: dict[str, Json], weights: Weights, rope: tuple[Array, float]) -> None:
        self.raw, self.w = raw, weights
        self.frequencies, self.scale = rope
        self.eps = raw["rms_norm_eps"]
        self.head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]

    def norm(self, x: Array, name: str) -> Array:
        return rms(x, self.w[f"{name}.weight"], self.eps)

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def qkv(self, x: Array, layer: int) -> tuple[Array, Array, Array]:
        parts = [self.linear(x, f"model.layers.{layer}.self_attn.{p}_proj") for p in "qkv"]
        q, k, v = (part.reshape(len(x), -1, self.head_dim) for part in parts)
        q, k = (rotate(y, self.frequencies, self.scale, interleaved=False) for y in (q, k))
        return q, k, v

    def out(self, mixed: Array, layer: int) -> Array:
        return self.linear(mixed.reshape(len(mixed), -1), f"model.layers.{layer}.self_attn.o_proj")

    def mlp(self, x: Array, layer: int) -> Array:
        name = f"model.layers.{layer}.mlp"
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(silu(gate) * up, f"{name}.down_proj")

    def head(self, x: Array) -> Array:
        tied = self.raw.get("tie_word_embeddings")
        return x @ self.w["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def pre_norm_layer(self, h: Array, layer: int, attention: Callable[[Array], Array]) -> Array:
        name = f"model.layers.{layer}"
        h = h + attention(self.norm(h, f"{name}.input_layernorm"))
        return h + self.mlp(self.norm(h, f"{name}.post_attention_layernorm"), layer)


def ouro(
    raw: dict[str, Json], weights: Weights, rope: tuple[Array, float], ids: list[int]
) -> tuple[list[Array], Array]:
    """Logits after every loop, and the exit gate before its sigmoid (loops, tokens)."""
    s = Stack(raw, weights, rope)
    h = weights["model.embed_tokens.weight"][ids]
    logits, gates = [], []
    for _ in range(raw["total_ut_steps"]):
        for layer, kind in enumerate(raw["layer_types"]):
            name = f"model.layers.{layer}"
            q, k, v = s.qkv(s.norm(h, f"{name}.input_layernorm"), layer)
            window = raw["sliding_window"] if kind == "sliding_attention" else None
            h = h + s.norm(s.out(attend(q, k, v, window), layer), f"{name}.input_layernorm_2")
            mlp = s.mlp(s.norm(h, f"{name}.post_attention_layernorm"), layer)
            h = h + s.norm(mlp, f"{name}.post_attention_layernorm_2")
        h = s.norm(h, "model.norm")
        logits.append(s.head(h))
        gates.append(s.linear(h, "model.early_exit_gate")[:, 0])
    return logits, np.stack(gates)


def nanbeige(
    raw: dict[str, Json], weights: Weights, rope: tuple[Array, float], ids: list[int]
) -> list[Array]:
    s = Stack(raw, weights, rope)
    h = weights["model.embed_tokens.weight"][ids]
    logits = []

    def attention(x: Array, layer: int) -> Array:
        return s.out(attend(*s.qkv(x, layer)), layer)

    for _ in range(raw["num_loops"]):
        for layer in range(raw["num_hidden_layers"]):
            h = s.pre_norm_layer(h, layer, partial(attention, layer=layer))
        normed = s.norm(h, "model.norm")
        logits.append(s.head(normed))
        h = h if raw["skip_loop_final_norm"] else normed
    return logits


def iquest(raw: dict[str, Json], weights: Weights, rope: tuple[Array, float], ids: list[int]) -> list[Array]:
    s = Stack(raw, weights, rope)
    h = weights["model.embed_tokens.weight"][ids]
    logits: list[Array] = []
    first: dict[int, tuple[Array, Array]] = {}

    def attention(x: Array, layer: int, loop: int) -> Array:
        q, k, v = s.qkv(x, layer)
        if loop == 0:
            first[layer] = k, v
            return s.out(attend(q, k, v), layer)
        gate = (
            weights[f"model.gate_projections.{layer}.weight"],
            weights[f"model.gate_projections.{layer}.bias"],
        )
        g = 1 / (1 + np.exp(-((q * gate[0]).sum(-1) + gate[1])))[..., None]
        own = attend(q, k, v, raw["loop_window_size"])
        return s.out(g * attend(q, *first[layer]) + (1 - g) * own, layer)

    for loop in range(raw["loop_num"]):
        for layer in range(raw["num_hidden_layers"]):
            h = s.pre_norm_layer(h, layer, partial(attention, layer=layer, loop=loop))
        logits.append(s.head(s.norm(h, "model.norm")))
    return logits


class Raven:
    """Prelude, core and coda of Huginn (`kind` huginn) and the retrofits (llama, olmo)."""

    def __init__(self, raw: dict[str, Json], weights: Weights, kind: str, rope: tuple[Array, float]) -> None:
        self.raw, self.w, self.kind = raw, weights, kind
        self.frequencies, self.scale = rope
        self.heads = raw["n_heads"]
        self.groups = raw.get("num_key_value_heads", self.heads)

    def norm(self, x: Array, name: str) -> Array:
        return rms(x, self.w[f"{name}.weight"], self.raw["norm_eps"])

    def attention(self, x: Array, name: str) -> Array:
        dim = raven_head_dim(self.raw, self.kind)
        qkv = x @ self.w[f"{name}.attn.Wqkv.weight"].T
        q, k, v = np.split(qkv, [self.heads * dim, (self.heads + self.groups) * dim], axis=-1)
        if self.kind == "olmo":
            q, k = self.norm(q, f"{name}.attn.q_norm"), self.norm(k, f"{name}.attn.k_norm")
        q, k, v = (y.reshape(len(x), -1, dim) for y in (q, k, v))
        if self.raw["qk_bias"]:
            bias = self.w[f"{name}.attn.qk_bias"]
            q, k = q + bias[0, 0], k + bias[1, 0]
        q, k = (rotate(y, self.frequencies, self.scale, self.kind == "huginn") for y in (q, k))
        return attend(q, k, v).reshape(len(x), -1) @ self.w[f"{name}.attn.proj.weight"].T

    def mlp(self, x: Array, name: str) -> Array:
        gate, up = np.split(x @ self.w[f"{name}.mlp.fc.weight"].T, 2, axis=-1)
        return (silu(gate) * up) @ self.w[f"{name}.mlp.proj.weight"].T

    def block(self, x: Array, name: str) -> Array:
        norms = [partial(self.norm, name=f"{name}.norm_{n}") for n in (1, 2, 3, 4)]
        if self.kind == "huginn":
            x = norms[1](x + self.attention(norms[0](x), name))
            return norms[3](x + self.mlp(norms[2](x), name))
        if self.kind == "olmo":
            x = x + norms[0](self.attention(x, name))
            return x + norms[1](self.mlp(x, name))
        x = x + self.attention(norms[0](x), name)
        return x + self.mlp(norms[1](x), name)

    def section(self, x: Array, name: str, size: str) -> Array:
        for layer in range(self.raw[f"n_layers_in_{size}"]):
            x = self.block(x, f"transformer.{name}.{layer}")
        return x

    def logits(self, ids: list[int], initial_state: Array | None) -> list[Array]:
        """After every step; the state starts from zeros unless the mode or the caller says otherwise."""
        mode = self.raw.get("initial_state_mode", "random")
        entered = self.w["transformer.wte.weight"][ids] * self.raw["init_values"]["embed_scale"]
        entered = self.section(entered, "prelude", "prelude")
        state = np.zeros_like(entered) if mode == "random" else entered
        state = state if initial_state is None else initial_state
        found = []
        for step in range(self.raw["mean_recurrence"]):
            if not (step == 0 and mode == "skip-adapter"):
                state = np.concatenate((state, entered), -1) @ self.w["transformer.adapter.weight"].T
            state = self.section(state, "core_block", "recurrent_block")
            found.append(self.readout(state))
        return found

    def readout(self, state: Array) -> Array:
        x = self.norm(state, "transformer.ln_f") if self.kind == "huginn" else state
        x = self.norm(self.section(x, "coda", "coda"), "transformer.ln_f")
        return x @ self.w["transformer.wte.weight" if self.raw["tie_embeddings"] else "lm_head.weight"].T


def unit(x: Array) -> Array:
    scaled: Array = x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    return scaled


class Dory:
    """Layers are (kind of attention, theta); `raw` gives sizes, counts of layers and the scales' factors."""

    def __init__(self, raw: dict[str, Json], weights: Weights, layers: list[tuple[str, float]]) -> None:
        self.raw, self.w, self.layers = raw, weights, layers
        self.init, self.dim, self.width = raw["init"], raw["head_dim"], raw["hidden_size"]

    def attention(self, h: Array, layer: int) -> Array:
        kind, theta = self.layers[layer]
        name = f"backbone.layers.{2 * layer}.mixer"
        q, k, v, g = (h @ self.w[f"{name}.{p}_proj.weight"].T for p in "qkvg")
        q, k, v = (x.reshape(len(h), -1, self.dim) for x in (q, k, v))
        inverse = theta ** -(np.arange(0, self.dim, 2) / self.dim)
        q, k = (unit(rotate(x, inverse, 1.0, interleaved=False)) for x in (q, k))
        scale = self.w[f"{name}.sqk"] * np.sqrt(self.dim) / self.init
        q = q * scale.reshape(-1, self.dim) ** 2
        window = self.raw["window"] if kind == "sliding_attention" else None
        mixed = attend(q, k, v, window).reshape(len(h), -1)
        gate = g * (self.w[f"{name}.s_gate"] * np.sqrt(self.raw["gate_init"]) / self.init) ** 2
        return unit(mixed / (1 + np.exp(-gate))) @ self.w[f"{name}.o_proj.weight"].T

    def mlp(self, h: Array, layer: int) -> Array:
        name = f"backbone.layers.{2 * layer + 1}.mixer"
        gate = h @ self.w[f"{name}.gate_proj.weight"].T * self.w[f"{name}.suv_gate"] * np.sqrt(self.width)
        up = h @ self.w[f"{name}.up_proj.weight"].T * self.w[f"{name}.suv_up"] * np.sqrt(self.width)
        return unit(silu(gate) * up) @ self.w[f"{name}.down_proj.weight"].T

    def step(self, h: Array, f: Callable[[Array], Array], alpha: Array) -> Array:
        h = unit(h)
        stepped: Array = h + np.abs(alpha * self.raw["alpha_init"] / self.init) * (unit(f(h)) - h)
        return stepped

    def run(self, h: Array, layers: range) -> Array:
        for layer in layers:
            name = f"backbone.layers.{2 * layer}.attn_alpha"
            h = self.step(h, partial(self.attention, layer=layer), self.w[name])
            name = f"backbone.layers.{2 * layer + 1}.mlp_alpha"
            h = self.step(h, partial(self.mlp, layer=layer), self.w[name])
        return h

    def logits(self, ids: list[int], loops: int) -> list[Array]:
        prelude, core, _ = self.raw["counts"]
        entered = unit(self.run(self.w["backbone.embeddings.weight"][ids], range(prelude)))
        state, found = entered, []
        for _ in range(loops):
            state = unit(self.run(unit(state) + entered, range(prelude, prelude + core)))
            h = unit(self.run(state, range(prelude + core, len(self.layers))))
            head = self.w.get("lm_head.weight", self.w["backbone.embeddings.weight"])
            found.append(h @ head.T * self.w["lm_head.logit_scale"] / self.init)
        return found


def dory_shapes(raw: dict[str, Json]) -> Shapes:
    width, inner, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    q, kv = raw["num_attention_heads"] * raw["head_dim"], raw["num_key_value_heads"] * raw["head_dim"]
    shapes: Shapes = {"backbone.embeddings.weight": (vocab, width), "lm_head.logit_scale": (vocab,)}
    if not raw["tied"]:
        shapes["lm_head.weight"] = (vocab, width)
    attention = {"q": (q, width), "k": (kv, width), "v": (kv, width), "g": (q, width), "o": (width, q)}
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for layer in range(sum(raw["counts"])):
        even, odd = f"backbone.layers.{2 * layer}", f"backbone.layers.{2 * layer + 1}"
        shapes |= {f"{even}.mixer.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{even}.mixer.sqk": (q,), f"{even}.mixer.s_gate": (q,), f"{even}.attn_alpha": (width,)}
        shapes |= {f"{odd}.mixer.{name}_proj.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{odd}.mixer.suv_gate": (inner,), f"{odd}.mixer.suv_up": (inner,)}
        shapes[f"{odd}.mlp_alpha"] = (width,)
    return shapes


class Hrm:
    """Two stacks in turn; the first `prefix` tokens see one another both ways."""

    def __init__(
        self, raw: dict[str, Json], weights: Weights, layers: int, frequencies: tuple[Array, float]
    ) -> None:
        self.raw, self.w, self.layers = raw, weights, layers
        self.frequencies, self.scale = frequencies

    def norm(self, x: Array) -> Array:
        return rms(x, np.ones(1), self.raw["rms_norm_eps"])

    def attention(self, x: Array, name: str, prefix: int) -> Array:
        dim = self.raw["head_dim"]
        parts = np.split(x @ self.w[f"{name}.gqkv_proj.weight"].T, 4, axis=-1)
        gate = parts[0]
        q, k, v = (part.reshape(len(x), -1, dim) for part in parts[1:])
        q, k = (rotate(y, self.frequencies, self.scale, interleaved=False) for y in (q, k))
        out = np.zeros_like(q)
        for token in range(len(x)):
            end = max(token + 1, prefix)
            for head in range(q.shape[1]):
                scores = k[:end, head] @ q[token, head] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ v[:end, head] / weights.sum()
        gated: Array = out.reshape(len(x), -1) / (1 + np.exp(-gate))
        return gated @ self.w[f"{name}.o_proj.weight"].T

    def stack(self, x: Array, which: str, prefix: int) -> Array:
        for layer in range(self.layers):
            name = f"model.{which}_module.layers.{layer}"
            x = x + self.attention(self.norm(x), f"{name}.attn", prefix)
            gate, up = np.split(self.norm(x) @ self.w[f"{name}.mlp.gate_up_proj.weight"].T, 2, axis=-1)
            x = x + (silu(gate) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T
        return self.norm(x)

    def logits(self, ids: list[int], prefix: int) -> list[Array]:
        raw = self.raw
        high = self.w["model.embed_tokens.weight"][ids] * (
            raw["embedding_scale"] or 1 / raw["initializer_range"]
        )
        low = np.broadcast_to(self.w["model.z_L_init"], high.shape)
        found = []
        for _ in range(raw["H_cycles"]):
            for _ in range(raw["L_cycles"]):
                low = self.stack(low + high, "L", prefix)
            high = self.stack(high + low, "H", prefix)
            found.append(high @ self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"]).T)
        return found


def hrm_shapes(raw: dict[str, Json], layers: int) -> Shapes:
    width, inner = raw["hidden_size"], raw["intermediate_size"]
    heads = raw["num_attention_heads"] * raw["head_dim"]
    layer: Shapes = {
        "attn.gqkv_proj.weight": (4 * heads, width),
        "attn.o_proj.weight": (width, heads),
        "mlp.gate_up_proj.weight": (2 * inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (raw["vocab_size"], width), "model.z_L_init": (width,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], width)
    for stack in "LH":
        for index in range(layers):
            shapes |= {f"model.{stack}_module.layers.{index}.{n}": shape for n, shape in layer.items()}
    return shapes


def llama_shapes(raw: dict[str, Json], norms: tuple[str, ...]) -> Shapes:
    """Names and shapes on disk of a model with Llama's layers; `norms` are those of one layer."""
    hidden, inner, vocab = raw["hidden_size"], raw["intermediate_size"], raw["vocab_size"]
    dim = raw.get("head_dim") or hidden // raw["num_attention_heads"]
    q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(raw["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, matrices, bias in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            shapes |= {f"{name}.{part}.{m}.weight": shape for m, shape in matrices.items()}
            if raw.get(bias):
                shapes |= {f"{name}.{part}.{m}.bias": shape[:1] for m, shape in matrices.items()}
        shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in norms}
    return shapes


def raven_head_dim(raw: dict[str, Json], kind: str) -> int:
    """OLMo's block alone reads the key; the others divide."""
    dim: int = (raw.get("head_dim") if kind == "olmo" else None) or raw["n_embd"] // raw["n_heads"]
    return dim


def raven_shapes(raw: dict[str, Json], kind: str) -> Shapes:
    hidden, inner, vocab = raw["n_embd"], raw["intermediate_size"], raw["vocab_size"]
    dim = raven_head_dim(raw, kind)
    groups: int = raw["num_key_value_heads"] if "num_key_value_heads" in raw else raw["n_heads"]
    layer: Shapes = {
        "attn.Wqkv.weight": ((raw["n_heads"] + 2 * groups) * dim, hidden),
        "attn.proj.weight": (hidden, raw["n_heads"] * dim),
        "mlp.fc.weight": (2 * inner, hidden),
        "mlp.proj.weight": (hidden, inner),
    }
    layer |= {f"norm_{n}.weight": (hidden,) for n in ((1, 2, 3, 4) if kind == "huginn" else (1, 2))}
    if kind == "olmo":
        layer |= {"attn.q_norm.weight": (raw["n_heads"] * dim,), "attn.k_norm.weight": (groups * dim,)}
    if raw["qk_bias"]:
        layer["attn.qk_bias"] = (2, 1, raw["n_heads"], dim)
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.adapter.weight": (hidden, 2 * hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    if not raw["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for section, size in (("prelude", "prelude"), ("core_block", "recurrent_block"), ("coda", "coda")):
        for index in range(raw[f"n_layers_in_{size}"]):
            shapes |= {f"transformer.{section}.{index}.{n}": shape for n, shape in layer.items()}
    return shapes
