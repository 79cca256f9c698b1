"""From options to a loaded engine: device, dtype, threads, warm-up. Used by the worker and the benchmarks."""

import logging
from pathlib import Path

import torch

from model.checkpoint.loader import is_stored_in_int8, load_model
from model.engine import Engine
from model.grammar.state import Vocabulary
from model.machine import usable_cores
from model.network.config import LoopedConfig
from model.network.int8 import integer_products_are_exact, use_integer_products
from model.network.looped import LoopedTransformer
from model.network.packed import multiplies_bf16, pack_linears
from model.options import WorkerOptions
from model.passes.backend import BackendMaker
from model.passes.native.backend import NativeOptions
from model.passes.native.library import NativeUnavailableError, choose
from model.passes.native.weights import check_covered
from model.passes.torch.backend import TorchMaker
from model.passes.torch.invariant import InvarianceError, make_invariant
from model.protocol import GenerationRequest, SamplingParams
from model.worker.prices import PriceKeeper

log = logging.getLogger(__name__)


class ModelOutputError(ValueError):
    """The model loads, but what it computes is no text."""


def build_engine(options: WorkerOptions) -> Engine:
    """Loads the model of `options` and runs one request through it.

    Raises ValueError (CheckpointError, ConfigError, EngineConfigError, ModelOutputError) for what a user
    can mend.
    """
    device = resolve_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads or usable_cores())
    quantization = resolve_quantization(options.quantization, options.model_path, device)
    if options.dtype == "bfloat16" and not multiplies_bf16(device):
        log.warning(
            "this CPU has no bfloat16 products: dtype float32 takes twice the memory and far less time"
        )
    loaded = load_model(
        options.model_path,
        device=device,
        dtype=options.dtype,
        generation_config=options.generation_config,
        int8=quantization == "int8",
        integer_products=False,
    )
    maker = choose_backend(options, loaded.model)
    if isinstance(maker, TorchMaker):
        use_integer_products(loaded.model)
        _choose_arithmetic(loaded.model, options.deterministic, quantization)
    vocabulary = load_vocabulary(Path(options.model_path), loaded.config)
    engine = Engine(loaded.model, options, vocabulary, maker)
    _warm_up(engine)
    if options.row_budget is None:
        engine.prices = PriceKeeper(engine)
    return engine


def choose_backend(options: WorkerOptions, model: LoopedTransformer) -> BackendMaker:
    """What runs the passes of a model whose modules are plain; raises ValueError for what can't be had."""
    if options.backend == "torch":
        return TorchMaker()
    try:
        choose()
        check_covered(model)
    except NativeUnavailableError as error:
        raise ValueError(f"backend native: {error}") from None
    return NativeOptions(threads=options.threads or usable_cores())


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
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not auto, cpu, cuda or cuda:N") from None
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
