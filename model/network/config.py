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
    """Where the norms of a layer sit around a sub-layer f (attention, then MLP).

    PRE            h + f(n(h))                     Llama, Nanbeige, IQuest, HRM-Text
    SANDWICH       h + m(f(n(h)))                  Ouro
    POST_ADD       m(h + f(n(h)))                  Huginn
    OUTPUT         h + m(f(h))                     OLMo-2
    INTERPOLATION  u + a (n(f(u)) - u), u = n(h)   Dory; `a` is a learned rate for each channel
    """

    PRE = "pre"
    SANDWICH = "sandwich"
    POST_ADD = "post_add"
    OUTPUT = "output"
    INTERPOLATION = "interpolation"


class NormKind(Enum):
    """What the norms of a model are.

    RMS    w x / sqrt(mean(x^2) + eps), w learned     most families
    PLAIN  the same without w                         HRM-Text
    UNIT   x / sqrt(sum(x^2) + eps), unit length      Dory
    """

    RMS = "rms"
    PLAIN = "plain"
    UNIT = "unit"


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
class UnitScales:
    """Factors of the learned scales of a model on the unit sphere (nGPT, arXiv 2410.01131; Dory).

    A scale `s` is stored near its initial value and used as `factor * s`; those of queries and of the output
    gate are squared then, and rates are taken without their sign.
    """

    query: float  # on each channel of every query head
    gate: float  # on the logits of attention's output gate
    mlp: float  # on the MLP's gate and up
    rate: float  # of the step from a state towards a sub-layer's output
    logit: float  # on the logit of each token


@dataclass(frozen=True)
class RelativeBias:
    """Positions told by a learned number for each head, added to the scores of self-attention (T5).

    The number depends on the distance between two tokens: near ones have a bucket each, further ones share
    buckets that widen with the logarithm, and all from `max_distance` on are one.
    """

    num_buckets: int
    max_distance: int

    def __post_init__(self) -> None:
        if (
            self.num_buckets < 4
        ):  # half of them for each direction in the encoder, half of those for near ones
            raise ConfigError(f"num_buckets is {self.num_buckets}; it must be at least 4")
        if self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"max_distance is {self.max_distance}; it must be greater than half of num_buckets, "
                f"{self.num_buckets // 2}"
            )


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder before a decoder: layers like the decoder's own that read a source both ways, once."""

    num_layers: int
    start_token_id: int  # what a text begins with, before any token of its own

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ConfigError(f"encoder layers are {self.num_layers}; it must be at least 1")


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
    max_loops: int | None = None  # that a request may ask for, with slots for them; None: num_loops
    norm_eps: float = 1e-6
    norm_kind: NormKind = NormKind.RMS
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_after_loop: bool = False  # the final norm closes every loop, and its output feeds the next
    norm_before_coda: bool = False  # the final norm is applied before the coda as well as after it
    norm_after_prelude: bool = False  # the final norm is applied to the prelude's output too
    input_injection: bool = False  # state <- adapter([state, prelude output]) at the start of a loop
    input_addition: bool = False  # state <- state + prelude output at the start of a loop (Dory)
    low_cycles: int = 0  # above 0 the block is two stacks with two states: its first half runs so often
    # on the low state, then its second half once on the high one, which is read out (HRM-Text)
    prefix_lm: bool = False  # tokens of a prompt see each other both ways (HRM-Text)
    initial_state: InitialState = InitialState.NOISE  # read only with input_injection
    initial_state_std: float = 0.0  # of the noise at scale 1, before it is cut at 3 of them
    embedding_scale: float = 1.0
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over all heads' channels of q and of k (OLMo-2)
    qk_bias: bool = False  # a bias per head on q and k, before the rotary embedding (Huginn)
    output_gate: bool = False  # attention's output times the sigmoid of a projection of its input
    unit_scales: UnitScales | None = None  # learned scales and unit queries and keys (Dory)
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    gated_mlp: bool = True  # False: down(act(up x)) (T5 1.0)
    head_scale: float = 1.0  # of the head's input
    encoder: EncoderConfig | None = None  # the block's layers also attend over what it makes of a source
    relative_bias: RelativeBias | None = None  # in place of the rotary embedding
    tie_embeddings: bool = False
    exit_gate: bool = False  # a learned gate on the state after each loop (Ouro)
    sliding_window: int | None = None  # tokens that a row of a windowed layer sees, its own included
    sliding_layers: tuple[int, ...] = ()  # the layers that are windowed, at every loop
    first_loop_gate: bool = False  # every layer windowed from loop 2 on, and there mixed by a learned
    # gate with attention over all K/V that the first loop stored (IQuest-Loop)
    rope: RopeConfig = field(default_factory=RopeConfig)
    second_rope: RopeConfig | None = None  # of the layers `second_rope_layers`
    second_rope_layers: tuple[int, ...] = ()
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
        if self.relative_bias is None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ConfigError(f"rotary dimension {self.rotary_dim} must be even, 2..head_dim {self.head_dim}")
        if self.rope.kind == "longrope" and len(self.rope.divisors) != self.rotary_dim // 2:
            raise ConfigError(
                f"rope short_factor has {len(self.rope.divisors)} numbers; "
                f"{self.rotary_dim // 2}, half the rotary dimension, are wanted"
            )
        self._check_windows()
        self._check_loops()
        self._check_encoder()

    def _check_windows(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}; it must be at least 1")
        if self.sliding_window is None and (self.sliding_layers or self.first_loop_gate):
            raise ConfigError("layers attend over a sliding_window, but its size is not given")

    def _check_loops(self) -> None:
        if self.max_loops is not None and self.max_loops < self.num_loops:
            raise ConfigError(
                f"max_loops is {self.max_loops}; it must be at least num_loops, {self.num_loops}"
            )
        if self.low_cycles and (self.num_block_layers % 2 or self.num_prelude_layers or self.num_coda_layers):
            raise ConfigError("a block of two stacks has as many layers in each, and no prelude or coda")

    def _check_encoder(self) -> None:
        if self.encoder is None:
            if self.relative_bias is not None:
                raise ConfigError("a relative_bias needs an encoder")
            return
        if self.num_prelude_layers or self.num_coda_layers or self.low_cycles or self.first_loop_gate:
            raise ConfigError("a decoder behind an encoder is one block of layers, each run in every loop")
        if self.relative_bias is None or self.num_kv_heads != self.num_heads:
            raise ConfigError(
                "a decoder behind an encoder has a relative_bias and as many K/V heads as heads"
            )
        if not self.encoder.start_token_id < self.vocab_size:
            raise ConfigError(
                f"start_token_id is {self.encoder.start_token_id}; it must be below vocab_size, "
                f"{self.vocab_size}"
            )

    @property
    def most_loops(self) -> int:
        """Loops that a request may ask for."""
        return self.num_loops if self.max_loops is None else self.max_loops

    @property
    def keeps_input(self) -> bool:
        """Whether every loop reads the prelude's output again."""
        return self.input_injection or self.input_addition

    @property
    def state_size(self) -> int:
        """Channels of a row's state between two loops: the high and the low state where there are two."""
        return self.hidden_size * (2 if self.low_cycles else 1)

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated (the first ones)."""
        return self.head_dim if self.rope.rotary_dim is None else self.rope.rotary_dim

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
    def stack_size(self) -> int:
        """Layers of each of the block's two stacks, with `low_cycles`."""
        return self.num_block_layers // 2

    @property
    def num_caches(self) -> int:
        """Layers as K/V counts them: one for each time that one runs within a loop.

        All layers, and the low stack's again for each further cycle. In a block of two stacks, cycle c of
        layer i of the low stack has cache c * stack_size + i; the high stack's stand behind them.
        """
        return self.num_layers + max(0, self.low_cycles - 1) * self.stack_size

    @property
    def num_slots(self) -> int:
        """Independent KV caches: one for each (loop, layer), as `num_caches` counts layers."""
        return sum(self.loops_of_layer(cache) for cache in range(self.num_caches))

    @property
    def layer_reads(self) -> tuple[int, int, int]:
        """Layers that are run before the loops, in each loop, and behind them."""
        looped = self.num_caches - self.num_prelude_layers - self.num_coda_layers
        return self.num_prelude_layers, looped, self.num_coda_layers

    def loops_of_layer(self, cache: int) -> int:
        """How many KV slots the layer with this index (0..num_caches-1) owns."""
        outside = cache < self.num_prelude_layers or cache >= self.num_caches - self.num_coda_layers
        return 1 if outside else self.most_loops

    def is_windowed(self, layer: int) -> bool:
        """Whether rows of this layer see a window only, at some loop at least."""
        return layer in self.sliding_layers or (self.first_loop_gate and layer in self.block)

    def window(self, layer: int, loop: int) -> int | None:
        """Tokens that a row of this layer sees in this loop (0..R-1), its own included; None is all."""
        return self.window_of_loop(loop) if self.is_windowed(layer) else None

    def window_of_loop(self, loop: int) -> int | None:
        """Tokens that a row of any windowed layer sees in this loop, its own included; None is all."""
        return None if self.first_loop_gate and loop == 0 else self.sliding_window

    @property
    def source_caches(self) -> range:
        """Indices behind `num_caches` of the K/V of a source: one for each layer, the same in every loop."""
        return range(self.num_caches, self.num_caches + (self.num_block_layers if self.encoder else 0))

    @property
    def kv_heads_per_token(self) -> int:
        """Heads of K and of V, `head_dim` numbers each, that a cell holds over all slots, a source's too."""
        return 2 * (self.num_slots + len(self.source_caches)) * self.num_kv_heads


_MAY_BE_ZERO = {"num_prelude_layers", "num_coda_layers", "low_cycles"}
_POSITIVE = [f.name for f in fields(LoopedConfig) if f.type is int and f.name not in _MAY_BE_ZERO]
