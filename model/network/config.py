"""What a looped model is: sizes, norms, rotary embedding, loops. Plain frozen data.

Knows nothing about tensors, files or any one family; `model.checkpoint.families` fills it in from a
checkpoint's config.json. Invariant: a `LoopedConfig` that exists is consistent (checked once, on
construction), so nothing downstream checks sizes again.
"""

from dataclasses import dataclass, field, fields
from enum import Enum


class ConfigError(ValueError):
    """A model configuration that cannot be served; the message names the field, value and limit."""


ACTIVATIONS = frozenset(
    (
        "silu",
        "swish",
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "relu2",
        "mish",
    )
)


class NormPlacement(Enum):
    """Where the RMSNorms of a layer sit around a sub-layer f (attention, then MLP).

    PRE       h + f(n(h))          Llama, Nanbeige, IQuest
    SANDWICH  h + m(f(n(h)))       Ouro
    POST_ADD  m(h + f(n(h)))       Huginn
    OUTPUT    h + m(f(h))          OLMo-2
    """

    PRE = "pre"
    SANDWICH = "sandwich"
    POST_ADD = "post_add"
    OUTPUT = "output"


class InitialState(Enum):
    """What the first loop of a model with `input_injection` starts from.

    NOISE         truncated normal noise times the request's scale, zeros at scale 0 (Huginn)
    INPUT         the block's input, mixed with itself by the adapter
    INPUT_ALONE   the block's input; the first loop leaves the adapter out
    """

    NOISE = "noise"
    INPUT = "input"
    INPUT_ALONE = "input_alone"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `kind` is one of default, linear, llama3, longrope, yarn. `factor` and the fields below it are read
    only by the kinds that define them (see `layers.rotary_frequencies`). `interleaved` pairs channels
    (0,1),(2,3),... instead of (0,d/2),(1,d/2+1),....
    """

    theta: float = 10000.0
    kind: str = "default"
    interleaved: bool = False
    rotary_dim: int | None = None
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()  # longrope: of the frequencies, one each


@dataclass(frozen=True)
class LoopedConfig:
    """Shape of a looped transformer: prelude layers, one block run `num_loops` times, coda layers.

    Sizes are counts of channels, heads or layers. `max_positions` is the longest context in tokens.
    Raises ConfigError on construction when the fields contradict each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_block_layers: int
    num_loops: int
    max_positions: int
    num_prelude_layers: int = 0
    num_coda_layers: int = 0
    norm_eps: float = 1e-6
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_after_loop: bool = False  # the final norm closes every loop, and its output feeds the next
    norm_before_coda: bool = False  # the final norm is applied before the coda as well as after it
    input_injection: bool = False  # state <- adapter([state, prelude output]) at the start of a loop
    initial_state: InitialState = InitialState.NOISE  # read only with input_injection
    initial_state_std: float = 0.0  # of the noise at scale 1, before it is cut at 3 of them
    embedding_scale: float = 1.0
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over all heads' channels of q and of k (OLMo-2)
    qk_bias: bool = False  # a bias per head on q and k, before the rotary embedding (Huginn)
    tie_embeddings: bool = False
    exit_gate: bool = False  # a learned gate on the state after each loop (Ouro)
    sliding_window: int | None = None  # tokens that a row of a windowed layer sees, its own included
    sliding_layers: tuple[int, ...] = ()  # the layers that are windowed, at every loop
    first_loop_gate: bool = False  # every layer windowed from loop 2 on, and there mixed by a learned
    # gate with attention over all K/V that the first loop stored (IQuest-Loop)
    rope: RopeConfig = field(default_factory=RopeConfig)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ConfigError(f"activation {self.activation!r} is not supported; {known} are")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(f"rotary dimension {self.rotary_dim} must be even, 2..head_dim {self.head_dim}")
        if self.rope.kind == "longrope" and len(self.rope.divisors) != self.rotary_dim // 2:
            raise ConfigError(
                f"rope short_factor has {len(self.rope.divisors)} numbers; "
                f"{self.rotary_dim // 2}, half the rotary dimension, are wanted"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}; it must be at least 1")
        if self.sliding_window is None and (self.sliding_layers or self.first_loop_gate):
            raise ConfigError("layers attend over a sliding_window, but its size is not given")

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated (the first ones)."""
        return self.head_dim if self.rope.rotary_dim is None else self.rope.rotary_dim

    @property
    def default_draft_depths(self) -> tuple[int, ...]:
        """Depths worth a prediction where nobody says otherwise: two early ones, none for one loop.

        Up to 12 loops the first two (measured: 4 loops, 1.25 passes per token against 1.39 with the
        first alone); a model of many small loops knows less after one: R / 16 and R / 4, 2 and 8 of 32.
        """
        loops = self.num_loops
        depths = (1, 2) if loops <= 12 else (max(1, loops // 16), loops // 4)
        return tuple(depth for depth in depths if depth < loops)

    @property
    def has_noisy_start(self) -> bool:
        """Whether a request with a scale above 0 starts from noise that its seed decides."""
        return self.input_injection and self.initial_state is InitialState.NOISE

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own: prelude, block, coda."""
        return self.num_prelude_layers + self.num_block_layers + self.num_coda_layers

    @property
    def prelude(self) -> range:
        """Indices of the layers before the loop."""
        return range(self.num_prelude_layers)

    @property
    def block(self) -> range:
        """Indices of the shared layers."""
        return range(self.num_prelude_layers, self.num_prelude_layers + self.num_block_layers)

    @property
    def coda(self) -> range:
        """Indices of the layers after the loop."""
        return range(self.num_prelude_layers + self.num_block_layers, self.num_layers)

    @property
    def num_slots(self) -> int:
        """Independent KV caches: one for each (loop, layer)."""
        return self.num_layers + (self.num_loops - 1) * self.num_block_layers

    def loops_of_layer(self, layer: int) -> int:
        """How many KV slots the layer with this index (0..num_layers-1) owns."""
        return self.num_loops if layer in self.block else 1

    def is_windowed(self, layer: int) -> bool:
        """Whether rows of this layer see a window only, at some loop at least."""
        return layer in self.sliding_layers or (self.first_loop_gate and layer in self.block)

    def window(self, layer: int, loop: int) -> int | None:
        """Tokens that a row of this layer sees in this loop (0..R-1), its own included; None is all."""
        return self.window_of_loop(loop) if self.is_windowed(layer) else None

    def window_of_loop(self, loop: int) -> int | None:
        """The same for any windowed layer."""
        return None if self.first_loop_gate and loop == 0 else self.sliding_window

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V that one position holds over all slots, at `itemsize` bytes a number."""
        return 2 * self.num_slots * self.num_kv_heads * self.head_dim * itemsize


_POSITIVE = [f.name for f in fields(LoopedConfig) if f.type is int and "prelude" not in f.name]
_POSITIVE.remove("num_coda_layers")
