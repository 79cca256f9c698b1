"""Every option of the engine, with its default, and every list of names: once. No torch here.

Each kind of options is one more: `EngineOptions` are an engine's, `WorkerOptions` also say which model it
loads. The server's settings take their defaults and names from here.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

DraftPolicyName = Literal["adaptive", "single", "gated", "recheck", "lookup", "none"]
POLICIES: tuple[DraftPolicyName, ...] = get_args(DraftPolicyName)
BackendName = Literal["auto", "torch", "native", "cuda"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationName = Literal["auto", "none", "int8", "int4"]
KVCacheDtypeName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
DEFAULT_BACKEND: BackendName = "auto"  # native on a CPU, cuda on a GPU, where they run; else torch
LOG_FORMAT = "%(levelname)s:     %(name)s: %(message)s"  # of the server's process and of the engine's
MAX_QUOTE = 80  # characters of a name that a message repeats
DEFAULT_ROW_BUDGET = 32  # rows of a pass without measured prices beyond which nothing is speculated


class SchedulerLimits(msgspec.Struct, frozen=True):
    """Bounds of a pass and of what runs at once, in rows and sequences.

    Prompts lengthen a pass in which others decode to `pass_time_factor` times what it would take alone.
    Raises ValueError for what cannot be.
    """

    max_num_seqs: int = 32
    prefill_chunk_size: int = 64
    prefill_rows: int | None = None  # of all prompts in a pass; None: those of four chunks
    prefix_caching: bool = True
    pass_time_factor: float = 2.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "prefill_chunk_size", "most_prompt_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.pass_time_factor >= 1:
            raise ValueError(f"pass_time_factor is {self.pass_time_factor}; it must be at least 1")
        if self.most_prompt_rows < self.prefill_chunk_size:
            raise ValueError(
                f"prefill_rows {self.prefill_rows} is below prefill_chunk_size {self.prefill_chunk_size}"
            )

    @property
    def most_prompt_rows(self) -> int:
        """Rows of prompts that a pass takes at most."""
        return 4 * self.prefill_chunk_size if self.prefill_rows is None else self.prefill_rows


class EngineOptions(SchedulerLimits, frozen=True, kw_only=True):
    """Options of an engine; None means the model's own or what fits."""

    draft_depths: tuple[int, ...] | None = None
    draft_policy: DraftPolicyName = "adaptive"
    max_model_len: int | None = None  # tokens
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None  # bytes; `kv_cache_tokens` goes first
    cache_sharers: int = 1  # engines that share what a cache may take where no size was asked for
    row_budget: int | None = None  # rows a pass; None: by measured pass times


class WorkerOptions(EngineOptions, frozen=True, kw_only=True, tag=True):
    """Everything that is needed to load a model and serve it; 0 threads are one for each core."""

    model_path: str
    max_loops: int | None = None  # that a request may ask for; None: the model's own
    device: str = "auto"  # auto, cpu, cuda, cuda:i
    dtype: DtypeName = "auto"
    quantization: QuantizationName = "auto"
    kv_cache_dtype: KVCacheDtypeName = "auto"  # float16 in native passes, else the type of the passes
    generation_config: bool = True  # whether generation_config.json names ending tokens
    threads: int = 0
    backend: BackendName = DEFAULT_BACKEND
    deterministic: bool | None = None  # what native passes are anyway, and torch's can't be
    prices: bytes = b""  # of passes, as the worker before has told them; none: from their file, or measured


ENGINE_DEFAULTS = EngineOptions()


def unknown_policy(name: str, known: Sequence[str] = POLICIES) -> str:
    """What is told of a draft policy that is none of those `known`."""
    return f"draft_policy {name[:MAX_QUOTE]!r} is not known; {', '.join(known)} are"
