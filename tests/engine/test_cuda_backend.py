"""The cuda backend behind the seam: texts as torch's, and the same with and without speculation.

Where there is no GPU the same step runs on the CPU: with plain operations, and once with the kernels in
Triton's interpreter, which takes a second for what a GPU does in a millisecond.
"""

import numpy as np
import pytest
import torch

from model.engine import Engine
from model.network.config import InitialState
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import EngineOptions, WorkerOptions
from model.passes.backend import BackendMaker
from model.passes.cuda.backend import CudaBackend, CudaOptions
from model.passes.cuda.choosing import cuda_maker
from model.passes.cuda.graphs import Graphs, kinds
from model.passes.cuda.inputs import COLUMNS, Columns, bucket_of, pass_inputs
from model.passes.cuda.operations import Operations, Shape, Tile
from model.passes.cuda.plain import PlainOperations
from model.passes.cuda.trial import run_a_kernel
from model.passes.cuda.weights import CudaUnavailableError, check_covered
from model.passes.rows import Rows
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.schedule.batch import PassResult, Readouts
from model.worker.build import choose_backend
from tests.cuda import DEVICE, fast_interpreter
from tests.loose import Field
from tests.tiny_models import BEHIND_ENCODER, SHAPES, tiny_config, tiny_model

__all__ = ["fast_interpreter"]


def plain(shape: Shape, tile: Tile) -> Operations:
    """Operations that run anywhere at once."""
    return PlainOperations(shape)


PLAIN = CudaOptions(operations=plain)
COVERED: dict[str, dict[str, Field]] = {
    name: SHAPES[name]
    for name in (
        "pre_norm",
        "norm_after_loop",
        "coda_behind_a_closing_norm",
        "one_loop",
        "multi_head",
        "sandwich",
        "prelude_and_coda",
        "sliding_windows",
        "started_from_the_input",
        "without_coda",
        "output_norm",
    )
}
COVERED["skipped_adapter"] = {
    "num_prelude_layers": 1,
    "num_coda_layers": 1,
    "input_injection": True,
    "initial_state": InitialState.INPUT_ALONE,
}
COVERED["biases"] = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_bias": True}
UNCOVERED = ("first_loop_gate", "unit_vectors", "two_stacks", "skipped_adapter")  # the last has qk_norm


def model_of(name: str) -> LoopedTransformer:
    """A tiny model of a shape, with biases that are not zero."""
    model = tiny_model(**COVERED[name])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model.to(DEVICE)


def request(index: int, speculation: bool, tokens: int = 7, **params: Field) -> GenerationRequest:
    """One of several requests whose prompts differ in length; every other one is drawn."""
    sampling = {"temperature": 6.0 if index % 2 else 0.0, "seed": index, **params}
    return GenerationRequest(
        request_id=str(index),
        prompt_token_ids=[3 + index, 5, 7, 9, 11][: 2 + index],
        max_tokens=tokens,
        sampling=SamplingParams(**sampling),
        speculation=speculation,
        ignore_eos=True,
    )


def engine_of(model: LoopedTransformer, maker: BackendMaker) -> Engine:
    """An engine that widens every wave and reads prompts in pieces."""
    options = EngineOptions(
        max_model_len=48, kv_cache_tokens=256, row_budget=16, prefill_chunk_size=3, draft_policy="single"
    )
    return Engine(model, options, maker=maker)


def tokens_of(events: list[TokenEvent]) -> list[int]:
    """The text; no request may have failed."""
    assert events[-1].error is None
    return [token for event in events for token in event.token_ids]


def texts(
    model: LoopedTransformer, maker: BackendMaker, speculation: bool, **params: Field
) -> list[list[int]]:
    """Texts of four requests at once."""
    engine = engine_of(model, maker)
    events = engine.run([request(index, speculation, **params) for index in range(4)])
    engine.check_integrity()
    return [tokens_of(events[str(index)]) for index in range(4)]


@pytest.mark.parametrize("name", COVERED)
def test_texts_are_those_of_torch_with_and_without_speculation(name: str) -> None:
    """Greedy and drawn requests, prompts in pieces, several sequences in a pass."""
    model = model_of(name)
    wanted = texts(model, TorchMaker(), speculation=False)
    assert len(set(map(tuple, wanted))) == 4
    assert texts(model, PLAIN, speculation=False) == wanted
    assert texts(model, PLAIN, speculation=True) == wanted


def test_int8_weights_give_the_texts_of_torch() -> None:
    model = model_of("prelude_and_coda")
    quantize_linears(model)
    wanted = texts(model, TorchMaker(), speculation=False)
    assert texts(model, PLAIN, speculation=False) == wanted
    assert texts(model, PLAIN, speculation=True) == wanted


@pytest.mark.parametrize(
    "params",
    [{"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.3}, {"frequency_penalty": 1.0}, {"logit_bias": {3: 4.0}}],
    ids=str,
)
def test_filters_penalties_and_biases_choose_as_torch_does(params: dict[str, Field]) -> None:
    """They take the way behind the step."""
    model = model_of("without_coda")
    wanted = texts(model, TorchMaker(), speculation=False, **params)
    assert wanted != texts(model, TorchMaker(), speculation=False)
    assert texts(model, PLAIN, speculation=True, **params) == wanted


def test_scores_are_those_of_torch() -> None:
    """Of tokens, of the prompt and of single loops."""
    model = tiny_model(**SHAPES["sandwich"]).to(DEVICE)
    asked = GenerationRequest(
        request_id="scored",
        prompt_token_ids=[5, 6, 7, 8],
        max_tokens=5,
        sampling=SamplingParams(temperature=0),
        logprobs=2,
        prompt_logprobs=1,
        loop_logprobs=2,
        ignore_eos=True,
    )
    found = [engine_of(model, maker).run([asked])["scored"] for maker in (TorchMaker(), PLAIN)]
    for wanted, got in zip(*found, strict=True):
        assert got.token_ids == wanted.token_ids
        for mine, theirs in zip(got.logprobs or [], wanted.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        for of_mine, of_theirs in zip(got.loop_logprobs or [], wanted.loop_logprobs or [], strict=True):
            for one, other in zip(of_mine, of_theirs, strict=True):
                assert one.scores.logprob == pytest.approx(other.scores.logprob, abs=1e-4)
    assert any(event.logprobs for event in found[0])
    assert any(event.loop_logprobs for event in found[0])


def test_states_that_start_from_noise_are_those_of_torch() -> None:
    """Beside a request without noise; it leaves none behind for the next request."""
    model = tiny_model(**{**SHAPES["without_coda"], "initial_state_std": 1.0}).to(DEVICE)

    def noisy(scale: float, name: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=name,
            prompt_token_ids=[5, 6, 7],
            max_tokens=7,
            sampling=SamplingParams(temperature=0, seed=3),
            init_scale=scale,
            ignore_eos=True,
        )

    requests = [noisy(1.0, "noisy"), noisy(0.0, "still")]
    engines = [engine_of(model, maker) for maker in (TorchMaker(), PLAIN)]
    wanted, got = (
        {name: tokens_of(events) for name, events in engine.run(requests).items()} for engine in engines
    )
    assert got == wanted
    assert wanted["noisy"] != wanted["still"]
    assert tokens_of(engines[1].run([noisy(0.0, "later")])["later"]) == wanted["still"]


def test_a_row_without_numbers_is_a_fault_of_its_own_request() -> None:
    """The other request in the pass goes on."""
    model = tiny_model(**SHAPES["without_coda"], vocab_size=61).to(DEVICE)
    model.head.weight = torch.nn.Parameter(model.head.weight.clone(), requires_grad=False)
    model.embedding.weight[60] = torch.nan
    bad = GenerationRequest(
        request_id="bad", prompt_token_ids=[60], max_tokens=3, sampling=SamplingParams(temperature=0)
    )
    events = engine_of(model, PLAIN).run([bad, request(0, speculation=True)])
    assert "not a number" in (events["bad"][-1].error or "")
    assert len(tokens_of(events["0"])) == 7


@pytest.mark.usefixtures("interpreter")
def test_the_kernels_give_torchs_text_with_and_without_speculation() -> None:
    """The whole step by kernels: prelude, adapter, block, coda, head, a greedy and a drawn choice.

    In the interpreter each program takes milliseconds, so there are few: large tiles, few heads, short texts.
    """
    sizes = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "num_block_layers": 1, "num_loops": 2}
    around = {"num_prelude_layers": 1, "num_coda_layers": 1, "input_injection": True}
    model = tiny_model(**sizes, **around).to(DEVICE)
    maker = CudaOptions(tile=Tile(16, 128, 64, 64, 1), graphs=False)

    def text(maker: BackendMaker, speculation: bool) -> list[list[int]]:
        events = engine_of(model, maker).run([request(i, speculation, tokens=2) for i in range(2)])
        return [tokens_of(events[str(i)]) for i in range(2)]

    wanted = text(TorchMaker(), False)
    assert text(maker, True) == wanted
    assert text(maker, False) == wanted


class Recorder:
    """A backend that notes the states and K/V behind every pass."""

    def __init__(self, backend: CudaBackend) -> None:
        self.backend = backend
        self.facts = backend.facts
        self.columns: list[list[int]] = []

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """A pass; what it was given is noted."""
        inputs = pass_inputs(rows, readouts, self.backend.cache.spare, with_choice=True)
        assert inputs.bucket == bucket_of(len(rows))
        columns = Columns(torch.from_numpy(inputs.numbers), inputs.bucket)
        self.columns.append([int(columns["cells"][row]) for row in range(inputs.bucket)])
        return self.backend.run(rows, readouts)


def test_padding_writes_to_the_spare_cell_alone() -> None:
    """Rows are padded to a power of two, and what stands in another text's cells stays."""
    engine = engine_of(model_of("prelude_and_coda"), PLAIN)
    assert isinstance(engine.backend, CudaBackend)
    recorder = Recorder(engine.backend)
    engine.backend = recorder
    engine.run([request(index, speculation=True) for index in range(3)])
    spare = recorder.backend.cache.spare
    assert spare == engine.pool.num_tokens
    padded = [cells for cells in recorder.columns if spare in cells]
    assert padded
    assert all(cells[cells.index(spare) :] == [spare] * (len(cells) - cells.index(spare)) for cells in padded)
    assert max(map(len, recorder.columns)) >= 8


def test_states_and_cached_keys_have_the_same_bits_alone_and_among_others() -> None:
    """The same request, alone without speculation and beside three with it; pages may lie elsewhere."""
    model = model_of("prelude_and_coda")

    def left(requests: list[GenerationRequest]) -> list[torch.Tensor]:
        engine = engine_of(model, PLAIN)
        for one in requests:
            engine.add(one)
        cells: list[int] = []
        while engine.has_requests:
            engine.step()
            for sequence in engine.scheduler.running:
                if sequence.request.request_id == "0" and sequence.table and sequence.wave.num_committed >= 8:
                    cells = list(sequence.table.cells(0, 7))
        backend = engine.backend
        assert isinstance(backend, CudaBackend)
        size = backend.cache.spare + 1
        caches = [backend.cache.layers[layer].keys for layer in range(model.config.num_caches)]
        kept = [keys.view(-1, size, *keys.shape[1:])[:, cells] for keys in caches]
        return [*kept, backend.cache.states[cells]]

    alone = left([request(0, speculation=False)])
    among = left([request(index, speculation=True) for index in range(4)])
    assert len(alone[-1]) == 7
    # a coda holds provisional entries behind a draft, which the last loop overwrites: all here are final
    assert all(torch.equal(one, other) for one, other in zip(alone, among, strict=True))


def test_the_numbers_of_a_pass_are_one_array_and_its_buffer_is_never_moved() -> None:
    """A captured graph reads where it was captured: one copy brings all that a pass is told."""
    engine = engine_of(model_of("pre_norm"), PLAIN)
    assert isinstance(engine.backend, CudaBackend)
    buffers = [engine.backend.buffers(8) for _ in range(2)]
    assert buffers[0] is buffers[1]
    at = buffers[0].numbers.data_ptr()
    engine.run([request(index, speculation=True) for index in range(4)])
    assert engine.backend.buffers(8).numbers.data_ptr() == at
    assert len(buffers[0].numbers) == 8 * (len(COLUMNS) + 3)  # pages of 48 positions for each row


def test_every_kind_of_pass_up_to_128_rows_is_captured() -> None:
    """With a coda a pass that chooses also runs it; without one there is nothing to run."""
    for name, flags in (("pre_norm", 4), ("prelude_and_coda", 6)):
        engine = engine_of(model_of(name), PLAIN)
        assert isinstance(engine.backend, CudaBackend)
        found = kinds(engine.backend.step)
        assert len(set(found)) == len(found) == 8 * flags
        assert found[0].bucket == 128


@pytest.mark.gpu
@pytest.mark.parametrize("name", COVERED)
def test_graphs_give_the_texts_of_torch_on_a_gpu(name: str) -> None:
    model = model_of(name)
    wanted = texts(model, TorchMaker(), speculation=False)
    engine = engine_of(model, CudaOptions())
    assert isinstance(engine.backend, CudaBackend)
    assert isinstance(engine.backend.runner, Graphs)
    assert texts(model, CudaOptions(), speculation=False) == wanted
    assert texts(model, CudaOptions(), speculation=True) == wanted
    assert texts(model, CudaOptions(graphs=False), speculation=True) == wanted


@pytest.mark.parametrize("name", UNCOVERED)
def test_models_that_no_kernel_covers_are_told_with_the_reason(name: str) -> None:
    config = tiny_config(**SHAPES[name])
    with pytest.raises(CudaUnavailableError, match=r"it has|its norms|its states"):
        check_covered(config)
    check_covered(tiny_config())


def test_a_decoder_behind_an_encoder_is_not_covered() -> None:
    with pytest.raises(CudaUnavailableError, match="encoder"):
        check_covered(tiny_config(**BEHIND_ENCODER))


def test_without_a_gpu_the_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend cuda: the device is cpu, not an NVIDIA GPU"):
        choose_backend(WorkerOptions(model_path="x", backend="cuda"), tiny_config(), torch.device("cpu"))


def test_on_a_gpu_a_model_that_is_not_covered_is_run_by_torch_with_a_word() -> None:
    """Known before anything is asked of the device."""
    device = torch.device("cuda:0")
    maker, why = choose_backend(WorkerOptions(model_path="x"), tiny_config(**SHAPES["two_stacks"]), device)
    assert isinstance(maker, TorchMaker)
    assert "its norms are of the kind plain" in why


def test_where_no_kernel_can_be_launched_torch_serves_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton compiles a launcher in C at its first launch: an image without a compiler fails there."""

    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease set CC")

    monkeypatch.setattr("model.passes.cuda.trial.run_a_kernel", fails)
    device = torch.device("cuda:0")
    with pytest.raises(
        CudaUnavailableError, match=r"RuntimeError: Failed to find C compiler\. \(it compiles"
    ):
        cuda_maker(tiny_config(), device)
    maker, why = choose_backend(WorkerOptions(model_path="x"), tiny_config(), device)
    assert isinstance(maker, TorchMaker)
    assert "C compiler" in why


@pytest.mark.usefixtures("interpreter")
def test_the_trial_runs_a_kernel_and_looks_at_what_it_gave() -> None:
    run_a_kernel(DEVICE)


def test_where_a_kernel_runs_a_covered_model_gets_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.passes.cuda.trial.run_a_kernel", lambda device: None)
    maker, why = choose_backend(WorkerOptions(model_path="x"), tiny_config(), torch.device("cuda:0"))
    assert (maker.name, why) == ("cuda", "")
    assert maker.cache_bytes(tiny_model()).states == 4 * 32


def test_seeds_of_all_64_bits_reach_the_device() -> None:
    """A seed is signed; the device reads the bits."""
    model = model_of("pre_norm")
    wanted = {}
    for seed in (-1, 2**63 - 1, -(2**63)):
        got = texts(model, PLAIN, speculation=True, seed=seed)
        assert got == texts(model, TorchMaker(), speculation=False, seed=seed)
        wanted[seed] = tuple(map(tuple, got))
    assert len(set(wanted.values())) == 3
    assert np.array([-1 % 2**64], np.uint64).view(np.int64)[0] == -1
