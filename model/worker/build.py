"""From options to a loaded engine: device, dtype, threads, warm-up. Used by the worker and the benchmarks."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from model.checkpoint.loader import is_stored_in_int8, load_config, load_model
from model.checkpoint.tokenizer import tokenizer_file
from model.engine import Engine
from model.grammar.state import Vocabulary
from model.machine import usable_cores
from model.network.arithmetic import multiplies_bf16
from model.network.config import LoopedConfig
from model.options import KVCacheDtypeName, QuantizationName, WorkerOptions
from model.passes.backend import BackendMaker
from model.passes.cuda.choosing import CudaUnavailableError, cuda_maker
from model.passes.native.backend import NativeOptions
from model.passes.native.library import NativeUnavailableError, load
from model.passes.native.library import choose as choose_level
from model.passes.native.weights import check_covered, release
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams
from model.worker.prices import PriceKeeper

log = logging.getLogger(__name__)


class ModelOutputError(ValueError):
    """The model loads, but what it computes is no text."""


class Choice(NamedTuple):
    """What is known before any weight is read: how the weights are held, and what runs the passes.

    `why_torch` is empty unless torch serves for want of the library or the kernels that are for the device.
    """

    device: torch.device
    quantization: QuantizationName  # what "auto" came to, if that was asked
    maker: BackendMaker
    why_torch: str = ""


def build_engine(options: WorkerOptions, report: Callable[[str], None] = lambda _: None) -> Engine:
    """Loads the model of `options` and runs one request through it; `report` hears what is done meanwhile.

    Raises ValueError (CheckpointError, ConfigError, EngineConfigError, ModelOutputError) for what a user
    can mend.
    """
    choice = choose(options)
    for warning in warnings_of(options, choice):
        log.warning("%s", warning)
    runs_in_torch = isinstance(choice.maker, TorchMaker)
    report("reading the weights")
    loaded = load_model(
        options.model_path,
        device=choice.device,
        dtype=options.dtype,
        generation_config=options.generation_config,
        int8=choice.quantization == "int8",
        max_loops=options.max_loops,
    )
    if choice.device.type == "cpu":
        # Beside the library torch computes next to nothing: threads of its own would spin on its cores.
        torch.set_num_threads((options.threads or usable_cores()) if runs_in_torch else 1)
    vocabulary = load_vocabulary(Path(options.model_path), loaded.config)
    maker = choice.maker
    if isinstance(maker, NativeOptions):  # the library has the weights in a layout of its own
        maker = dataclasses.replace(maker, frees=True)
    engine = Engine(loaded.model, options, vocabulary, maker)
    if isinstance(maker, NativeOptions):
        release(loaded.model)
    report("running a first request")
    _warm_up(engine)
    if options.row_budget is None:
        report("finding out what passes cost")
        engine.prices = PriceKeeper(engine, options.prices)
    return engine


def choose(options: WorkerOptions) -> Choice:
    """How the model of `options` is held and run on this machine, by its config.json alone.

    Raises what `load_config` does, and ValueError for what can't be had.
    """
    config = load_config(options.model_path, generation_config=False)
    device = resolve_device(options.device)
    maker, why_torch = choose_backend(options, config, device)
    runs_in_torch = isinstance(maker, TorchMaker)
    if runs_in_torch and options.deterministic:
        reason = f" ({why_torch})" if why_torch else ""
        raise ValueError(
            "--deterministic holds for passes of the cuda backend and of the native library, on a CPU; torch "
            "would run them here"
            f"{reason}, and its products round by the number of rows in a pass"
        )
    quantization = options.quantization
    if quantization == "auto":
        keeps = not runs_in_torch and is_stored_in_int8(options.model_path)
        quantization = "int8" if keeps else "none"
    if quantization == "int4":
        if not isinstance(maker, NativeOptions):
            reason = f": {why_torch}" if why_torch else ""
            raise ValueError(f"quantization int4: only native passes on a CPU multiply it{reason}")
        maker = dataclasses.replace(maker, int4=True)
    if options.kv_cache_dtype != "auto":
        maker = _holding(maker, options.kv_cache_dtype, device)
    return Choice(device, quantization, maker, why_torch)


def _holding(maker: BackendMaker, kv_dtype: KVCacheDtypeName, device: torch.device) -> BackendMaker:
    """The same maker, of a backend that holds K/V in a type. Raises ValueError where none does."""
    if device.type != "cpu" or not isinstance(maker, NativeOptions | TorchMaker):
        raise ValueError(
            f"kv_cache_dtype {kv_dtype}: on {device} K/V has the type of the passes (dtype), so that auto "
            "alone is possible; on a CPU every type is"
        )
    return dataclasses.replace(maker, kv_dtype=kv_dtype)


def choose_backend(
    options: WorkerOptions, config: LoopedConfig, device: torch.device
) -> tuple[BackendMaker, str]:
    """What runs the passes, and why torch does if what is for the device was to be taken but can't be.

    Raises ValueError where a backend is asked for and can't be had.
    """
    if options.backend == "torch":
        return TorchMaker(), ""
    wanted = options.backend
    if wanted == "auto":
        wanted = "cuda" if device.type == "cuda" else "native"
    try:
        if wanted == "cuda":
            return cuda_maker(config, device), ""
        load(choose_level())
        check_covered(config, device)
    except (NativeUnavailableError, CudaUnavailableError) as error:
        if options.backend != "auto":
            raise ValueError(f"backend {wanted}: {error}") from None
        return TorchMaker(), str(error)
    return NativeOptions(threads=options.threads or usable_cores()), ""


def warnings_of(options: WorkerOptions, choice: Choice) -> list[str]:
    """What a user should know of a choice: what was asked for changes nothing, or costs a lot of time."""
    warnings = []
    if choice.why_torch:
        slower = "several times slower for a small model" if choice.device.type == "cpu" else "more slowly"
        warnings.append(f"torch runs the passes, {slower}: {choice.why_torch}")
    if not isinstance(choice.maker, TorchMaker):
        if options.deterministic is not None:
            warnings.append(
                f"--deterministic changes nothing: passes of the {choice.maker.name} backend always are"
            )
    elif options.dtype == "bfloat16" and not multiplies_bf16(choice.device):
        warnings.append(
            "this CPU has no bfloat16 products: with torch, dtype float32 takes twice the memory and far "
            "less time"
        )
    return warnings


def load_vocabulary(folder: Path, config: LoopedConfig) -> Vocabulary | None:
    """What grammars need of the model's tokenizer, 15 ms for 4,000 tokens; None if there is no usable one."""
    try:
        file = tokenizer_file(folder)
        if file is None:
            raise ValueError(f"{folder} has no tokenizer")
        text = file.read_text(encoding="utf-8")
        return Vocabulary(text, config.vocab_size, config.eos_token_ids)
    except (OSError, ValueError) as error:
        log.warning("requests with a grammar will be refused: %s", error)
        return None


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"device {name}: this machine has {count} CUDA devices")
    return device


def _warm_up(engine: Engine) -> None:
    """One short request: memory is mapped and kernels are chosen before the first user comes.

    Raises ModelOutputError for a model that says nothing.
    """
    sampling = SamplingParams(temperature=0)
    count = min(4, engine.max_model_len - 1)
    request = GenerationRequest(
        request_id="warm-up", prompt_token_ids=[0], max_tokens=count, sampling=sampling, ignore_eos=True
    )
    last = engine.run([request])["warm-up"][-1]
    if last.finish_reason == "error":
        dtype = engine.info.dtype
        raise ModelOutputError(
            f"the model does not work: {last.error}. Its weights are damaged, or too large for {dtype}"
        )
