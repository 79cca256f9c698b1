"""What is chosen before weights are read: the backend, how weights are held, and what is said of it."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from cli.main import main
from model import save_checkpoint
from model.network.int8 import Int8Linear
from model.options import DtypeName, KVCacheDtypeName, WorkerOptions
from model.passes.native import library
from model.passes.native.backend import NativeBackend, NativeOptions
from model.passes.torch.backend import TorchMaker
from model.worker.build import Choice, build_engine, choose, warnings_of
from tests.loose import Field
from tests.native import HAS_LIBRARY
from tests.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    return tmp_path


@pytest.fixture
def folder_in_int8(tmp_path: Path) -> Path:
    save_checkpoint(tiny_model(), tmp_path, torch.float32, int8=True)
    return tmp_path


def options(folder: Path, **fields: Field) -> WorkerOptions:
    fields = {"kv_cache_tokens": 256, "row_budget": 8, "threads": 1, "device": "cpu", **fields}
    return WorkerOptions(model_path=str(folder), **fields)


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.native
@pytest.mark.parametrize(("asked", "held"), [("auto", "int8"), ("int8", "int8"), ("none", "none")])
def test_int8_is_kept_where_native_runs_the_passes(folder_in_int8: Path, asked: str, held: str) -> None:
    """On any CPU: torch's integer products saturate without VNNI, and 2.6 times the speed was lost there."""
    choice = choose(options(without_weights(folder_in_int8), quantization=asked))
    assert (choice.quantization, choice.maker) == (held, NativeOptions(threads=1))


@pytest.mark.native
@pytest.mark.parametrize("stored", ["folder", "folder_in_int8"])
def test_int4_is_what_the_library_makes_of_the_weights(stored: str, request: pytest.FixtureRequest) -> None:
    asked = options(request.getfixturevalue(stored), quantization="int4")
    choice = choose(asked)
    assert (choice.quantization, choice.maker) == ("int4", NativeOptions(threads=1, int4=True))
    weights = []
    for quantization in ("none", "int4"):
        backend = build_engine(msgspec.structs.replace(asked, quantization=quantization)).backend
        assert isinstance(backend, NativeBackend)
        weights.append(backend.passes.packed.weight_bytes)
    assert weights[0] / 7.2 < weights[1] < weights[0] / 5  # 4.5 bits of 32, in whole groups


@pytest.mark.parametrize("way", ["backend", "environment"])
def test_int4_is_refused_where_torch_would_run_the_passes(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv(library.VARIABLE, "0")
    asked = options(folder, quantization="int4", backend="torch" if way == "backend" else "auto")
    with pytest.raises(
        ValueError,
        match="quantization int4: only native passes"
        + (".*SPEED_NATIVE is 0" if way == "environment" else ""),
    ):
        choose(asked)


@pytest.mark.native
def test_a_model_that_is_not_stored_in_int8_stays_as_it_is(folder: Path) -> None:
    assert choose(options(folder)).quantization == "none"


@pytest.mark.parametrize("way", ["backend", "environment"])
def test_where_torch_runs_the_passes_int8_is_widened(
    folder_in_int8: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "environment":
        monkeypatch.setenv(library.VARIABLE, "0")
    asked = options(without_weights(folder_in_int8), backend="torch" if way == "backend" else "auto")
    choice = choose(asked)
    assert choice.quantization == "none"
    assert isinstance(choice.maker, TorchMaker)
    assert choose(msgspec.structs.replace(asked, quantization="int8")).quantization == "int8"
    said = warnings_of(asked, choice)
    assert said == [] if way == "backend" else "SPEED_NATIVE is 0" in said[0]


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.native)])
@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_the_engine_and_inspect_hold_weights_as_chosen(
    folder_in_int8: Path, backend: str, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(folder_in_int8, backend=backend, quantization=quantization)
    engine = build_engine(asked)
    keeps = backend == "native" and quantization == "auto"
    assert engine.info.backend == backend
    assert isinstance(engine.model.head, Int8Linear) == keeps
    arguments = ["--device", "cpu", "--quantization", quantization, "--backend", backend, "--json"]
    assert main(["inspect", str(folder_in_int8), *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["quantization"], facts["backend"]) == ("int8" if keeps else "none", backend)
    per_token = facts["kv_bytes_per_token"] + facts["state_bytes_per_token"]
    assert per_token == engine.backend.facts.bytes_per_token


@pytest.mark.native
@pytest.mark.parametrize("asked", [True, False])
def test_native_passes_are_deterministic_whatever_is_asked(
    folder: Path, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert build_engine(options(folder, deterministic=asked)).info.deterministic
    assert caplog.text.count("--deterministic changes nothing") == 1


def test_torch_refuses_what_it_cannot_promise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not build_engine(options(folder, backend="torch", deterministic=False)).info.deterministic
    with pytest.raises(ValueError, match=r"--deterministic holds for .* native library, on a CPU; torch"):
        choose(options(folder, backend="torch", deterministic=True))
    monkeypatch.setenv(library.VARIABLE, "0")
    with pytest.raises(ValueError, match=r"would run them here \(SPEED_NATIVE is 0\)"):
        choose(options(folder, deterministic=True))


@pytest.mark.parametrize("has_products", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("maker", [TorchMaker(), NativeOptions()], ids=["torch", "native"])
def test_bf16_in_torch_on_a_cpu_without_its_products_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, has_products: bool, dtype: DtypeName, maker: NativeOptions | TorchMaker
) -> None:
    monkeypatch.setattr("model.worker.build.multiplies_bf16", lambda device: has_products)
    choice = Choice(torch.device("cpu"), "none", maker)
    said = warnings_of(WorkerOptions(model_path="x", dtype=dtype), choice)
    wanted = dtype == "bfloat16" and not has_products and isinstance(maker, TorchMaker)
    assert ["no bfloat16 products" in warning for warning in said] == [True] * wanted


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.native)])
def test_the_engine_and_inspect_hold_k_and_v_as_asked(
    folder: Path, backend: str, kv: KVCacheDtypeName, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = build_engine(options(folder, backend=backend, kv_cache_dtype=kv))
    assert engine.info.kv_cache_dtype == kv
    arguments = ["--device", "cpu", "--kv-cache-dtype", kv, "--backend", backend, "--json"]
    assert main(["inspect", str(folder), *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kv_cache_dtype"] == kv
    per_token = facts["kv_bytes_per_token"] + facts["state_bytes_per_token"]
    assert per_token == engine.backend.facts.bytes_per_token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_k_and_v_are_held_by_themselves_as_the_backend_does(folder: Path, dtype: DtypeName) -> None:
    assert build_engine(options(folder, backend="torch", dtype=dtype)).info.kv_cache_dtype == dtype
    if HAS_LIBRARY:
        native = build_engine(options(folder, backend="native", dtype=dtype))
        assert native.info.kv_cache_dtype == "float16"


def test_k_and_v_of_another_type_are_refused_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.worker.build.resolve_device", lambda name: torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"kv_cache_dtype int8: on cuda:0 .* auto alone is possible"):
        choose(options(folder, kv_cache_dtype="int8"))
    assert choose(options(folder)).maker == TorchMaker()
