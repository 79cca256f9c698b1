"""The library's structures, field by field as in src/api.h, src/products.h and src/sampling.h.

Knows nothing about models. Invariant: `library.load` compares the sizes of all of them with the library's
own, so that a difference is an error at load and never a crash later.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum

INTERFACE = 7  # src/api.h
BLOCK = 16  # outputs that are stored together
PAGE = 16  # positions of a page of K/V
MOST_INPUTS = 65536
MOST_CHUNKS = 65535
PARTS = ("enter", "mix in", "qkv", "attention", "out", "gate and up", "down", "join", "head")  # of a pass


class WeightType(IntEnum):
    """How a matrix is held."""

    FP32 = 0
    BF16 = 1
    INT8 = 2  # one scale for each output
    INT4 = 3  # one scale for each output and 32 inputs


class KVType(IntEnum):
    """How K/V is held."""

    FLOAT32 = 0
    FLOAT16 = 1  # saturates
    BFLOAT16 = 2
    INT8 = 3  # one scale for each position and head of K, and of V


class SourceType(IntEnum):
    """What numbers are given as."""

    FP32 = 0
    BF16 = 1
    FP16 = 2
    INT8 = 3


def _int32s(names: str) -> list[tuple[str, type]]:
    return [(name, c_int32) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names.split()]


class Matrix(ctypes.Structure):
    """A packed weight."""

    _fields_ = [*_int32s("type inputs blocks unused"), *_pointers("data scales bias")]


class Layer(ctypes.Structure):
    """The weights of a layer; what it doesn't have is NULL."""

    _fields_ = [
        *[(name, Matrix) for name in ("qkv", "o", "gate_up", "down")],
        *[(name, Matrix) for name in ("source_q", "source_k", "source_v", "source_o")],
        *_pointers("attn_norm mlp_norm attn_out_norm mlp_out_norm attn_sum_norm mlp_sum_norm source_norm"),
        *_pointers("q_norm k_norm qk_bias loop_gate_weight loop_gate_bias"),
        *_pointers("query_scale gate_scale mlp_gate_scale mlp_up_scale attn_rate mlp_rate"),
        *_int32s("windowed second_rope"),
    ]


class Model(ctypes.Structure):
    """Sizes and weights of a looped transformer."""

    _fields_ = [
        *_int32s("vocab_size hidden_size intermediate_size num_heads num_kv_heads head_dim rotary_dim"),
        *_int32s("max_positions num_prelude_layers num_block_layers num_coda_layers num_loops"),
        *_int32s("placement norm_after_loop norm_before_coda input_injection start activation interleaved"),
        *_int32s("window first_loop_gate embedding_type"),
        *_int32s("output_gate input_addition norm_after_prelude low_cycles"),
        *_int32s("num_encoder_layers plain_mlp bias_distance"),
        *[(name, c_float) for name in ("norm_eps", "embedding_scale", "attention_scale")],
        ("layers", POINTER(Layer)),
        *_pointers("embedding embedding_scales norm"),
        ("head", Matrix),
        ("adapter", Matrix),
        *_pointers("cos sin second_cos second_sin logit_scale"),
        *_pointers("low_state encoder_norm text_bias source_bias"),
    ]


class Setup(ctypes.Structure):
    """Threads and memory of an engine."""

    _fields_ = [
        *_int32s("num_threads spin_microseconds num_pages kv_type"),
        *_pointers("cache states"),
    ]


class Pass(ctypes.Structure):
    """The rows of a pass and where its results go."""

    _fields_ = [
        *_int32s("num_rows num_pages num_readouts num_logits num_noise"),
        *_int32s("num_kept num_given encodes"),
        *_pointers("tokens positions loops tables pages ends noises noise"),
        *_pointers("readouts logit_rows tokens_out logits kept kept_out given"),
        *_pointers("lasts source_tables source_lasts"),
    ]


class PackJob(ctypes.Structure):
    """A matrix to be packed."""

    _fields_ = [
        *_int32s("type source_type inputs blocks"),
        *_pointers("source source_scales row_map data scales"),
    ]


class Choosing(ctypes.Structure):
    """Rows of logits, and how a token of each is chosen; see src/sampling.h."""

    _fields_ = [*_int32s("num_rows num_logits"), *_pointers("logits rows choices tokens scratch")]


class Scoring(ctypes.Structure):
    """Rows of logits, and tokens that they are asked about."""

    _fields_ = [
        *_int32s("num_rows num_logits num_top unused"),
        *_pointers("logits rows tokens logprobs ranks top_tokens top_logprobs"),
    ]


class Choice(ctypes.Structure):
    """How one token is chosen; `choosing.CHOICE` is the same for numpy, which makes many at once."""

    _fields_ = [
        ("seed", c_uint64),
        ("position", c_int64),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("repetition", c_float),
        ("frequency", c_float),
        ("presence", c_float),
        ("num_counted", c_int32),
        ("num_biased", c_int32),
        ("num_banned", c_int32),
        ("counted", c_uint64),
        ("outputs", c_uint64),
        ("biased", c_uint64),
        ("biases", c_uint64),
        ("banned", c_uint64),
        ("forbidden", c_uint64),
    ]


SAMPLING_SIZES = [ctypes.sizeof(Choice), ctypes.sizeof(Choosing), ctypes.sizeof(Scoring)]
SIZES = [ctypes.sizeof(kind) for kind in (Matrix, Layer, Model, Setup, Pass, PackJob, c_void_p)]


def declare(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types."""
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "speed_interface": (c_int32, []),
        "speed_sizes": (None, [POINTER(c_int32)]),
        "speed_level": (c_char_p, []),
        "speed_block_bytes": (c_uint64, [c_int32, c_int32]),
        "speed_pack": (c_int32, [POINTER(PackJob)]),
        "speed_cache_bytes": (c_uint64, [POINTER(Model), c_int32, c_int32]),
        "speed_open": (c_void_p, [POINTER(Model), POINTER(Setup), c_char_p, c_int32]),
        "speed_close": (None, [c_void_p]),
        "speed_run": (c_int32, [c_void_p, POINTER(Pass), c_char_p, c_int32]),
        "speed_times": (None, [c_void_p, POINTER(c_int64)]),
        "speed_stream": (c_uint64, [c_void_p, c_uint64]),
        "speed_sampling_sizes": (None, [POINTER(c_int32)]),
        "speed_scratch_bytes": (c_uint64, [c_void_p]),
        "speed_choose": (c_int32, [c_void_p, POINTER(Choosing), c_char_p, c_int32]),
        "speed_score": (c_int32, [c_void_p, POINTER(Scoring), c_char_p, c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
