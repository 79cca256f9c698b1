"""From options to a loaded engine: device, dtype, threads, warm-up. Used by the worker and the benchmarks."""

import logging
import os
from pathlib import Path

import torch

from model.config import LoopedConfig
from model.engine import Engine, EngineConfig
from model.invariant import InvarianceError, make_invariant
from model.loader import is_stored_in_int8, load_model
from model.looped import LoopedTransformer
from model.matching import Vocabulary
from model.measure import measured_cost
from model.packed import multiplies_bf16, pack_linears
from model.protocol import GenerationRequest, SamplingParams
from model.quantize import integer_products_are_exact
from model.scheduler import DEFAULT_ROW_BUDGET, SchedulerLimits
from model.worker import EngineOptions

log = logging.getLogger(__name__)


def build_engine(options: EngineOptions) -> Engine:
    """Loads the model of `options` and runs one request through it.

    Raises ValueError (CheckpointError, ConfigError, EngineConfigError) for what a user can mend.
    """
    device = resolve_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    if options.dtype == "bfloat16" and not multiplies_bf16(device):
        log.warning(
            "this CPU has no bfloat16 products: dtype float32 takes twice the memory and far less time"
        )
    quantization = resolve_quantization(options.quantization, options.model_path, device)
    loaded = load_model(
        options.model_path,
        device=device,
        dtype=options.dtype,
        generation_config=options.generation_config,
        int8=quantization == "int8",
    )
    limits = SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        prefill_chunk_size=options.prefill_chunk_size,
        prefill_rows=options.prefill_chunk_size * loaded.config.num_loops,
        prefix_caching=options.prefix_caching,
    )
    config = EngineConfig(
        draft_depths=options.draft_depths,
        draft_policy=options.draft_policy,
        max_model_len=options.max_model_len,
        kv_cache_tokens=options.kv_cache_tokens,
        kv_cache_memory=options.kv_cache_memory,
        row_budget=options.row_budget or DEFAULT_ROW_BUDGET,
        limits=limits,
    )
    _choose_arithmetic(loaded.model, options.deterministic, quantization)
    engine = Engine(loaded.model, config, load_vocabulary(Path(options.model_path), loaded.config))
    _warm_up(engine)
    if options.row_budget is None:
        engine.scheduler.cost = measured_cost(engine)
    return engine


def load_vocabulary(folder: Path, config: LoopedConfig) -> Vocabulary | None:
    """What grammars need of the model's tokenizer, 15 ms for 4,000 tokens; None if there is no usable one."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Vocabulary(text, config.vocab_size, config.eos_token_ids)
    except (OSError, ValueError) as error:
        log.warning("requests with a grammar will be refused: %s", error)
        return None


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {name}: this machine has {count} CUDA devices")
    return device


def resolve_quantization(name: str, folder: str | Path, device: torch.device) -> str:
    """What `--quantization` means for a checkpoint, "none" or "int8"; raises what `load_config` does.

    "auto" keeps int8 where the checkpoint has it and products of integers are exact: on most CPUs.
    """
    if name != "auto":
        return name
    kept = is_stored_in_int8(folder) and device.type == "cpu" and integer_products_are_exact()
    return "int8" if kept else "none"


def _choose_arithmetic(model: LoopedTransformer, deterministic: bool | None, quantization: str) -> None:
    """Batch-invariant modules if asked for, packed ones if not, in place.

    Nobody having said, invariant ones where the products are sums of integers anyway: what is left costs 5 %
    at most (the embedded model, fp32, 1 to 8 requests at once). Raises InvarianceError where they are asked
    for and can't be had.
    """
    cheap = quantization == "int8" and model.dtype == torch.float32
    if deterministic or (deterministic is None and cheap):
        try:
            make_invariant(model)
        except InvarianceError:
            if deterministic:
                raise
        else:
            return
    pack_linears(model)


def _warm_up(engine: Engine) -> None:
    """One short request: memory is mapped and kernels are chosen before the first user comes."""
    sampling = SamplingParams(temperature=0)
    count = min(4, engine.max_model_len - 1)
    engine.run(
        [GenerationRequest(request_id="warm-up", prompt_token_ids=[0], max_tokens=count, sampling=sampling)]
    )
