"""int8 checkpoints: what is written is what is multiplied, in every layout; everything else is one error."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cli.main import main
from model import load_model, save_checkpoint
from model.checkpoint.families.quantized import int8_fields
from model.checkpoint.files import CheckpointError
from model.checkpoint.loader import is_stored_in_int8, load_skeleton
from model.network.config import ConfigError
from model.network.int8 import Int8Linear, quantize_linears, quantized
from model.network.looped import LoopedTransformer
from tests.checkpoint_edits import edit_config, edit_tensors
from tests.loose import Field
from tests.tiny_models import tiny_model

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
QKV = "layers.1.attn.qkv_proj"
NAME = "model.layers.1.self_attn.k_proj.weight"
RAVEN = {
    "family": "raven",
    "input_injection": True,
    "initial_state_std": 0.1,
    "num_prelude_layers": 1,
    "num_coda_layers": 1,
}
LAYOUTS: dict[str, dict[str, Field]] = {
    "nanbeige": {},
    "nanbeige_tied": {"tie_embeddings": True, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "raven": RAVEN,
    "raven_tied": {**RAVEN, "tie_embeddings": True, "eos_token_ids": (1, 2), "embedding_scale": 2.0},
    "raven_without_coda": {**RAVEN, "num_coda_layers": 0, "num_prelude_layers": 2},
    "raven_of_the_core_alone": {**RAVEN, "num_coda_layers": 0, "num_prelude_layers": 0},
}


def model_of(layout: str) -> LoopedTransformer:
    """Norms and biases that are not ones and zeros, and that bf16 holds exactly."""
    model = tiny_model(**LAYOUTS[layout])
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            parameter.copy_((torch.arange(len(parameter)) + number) % 5 / 4 + 0.5)
    return model


def rounded(model: LoopedTransformer) -> LoopedTransformer:
    """The same model with every matrix replaced by what its int8 numbers stand for.

    The adapter is stored in bfloat16: in int8 a small share of the state beside a whole of the input was
    rounded to nothing, and every loop computed the same.
    """
    for name, parameter in model.named_parameters():
        if name == "adapter.weight":
            parameter.copy_(parameter.bfloat16())
        elif parameter.ndim == 2:
            weight, scales = quantized(parameter)
            parameter.copy_(weight * scales[:, None])
            assert name != "norm.weight"
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(model_of("nanbeige"), tmp_path, torch.float32, int8=True)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_in_int8_loads_as_its_rounded_weights(tmp_path: Path, layout: str) -> None:
    save_checkpoint(model_of(layout), tmp_path, torch.bfloat16, int8=True)
    loaded, model = load_model(tmp_path), rounded(model_of(layout))
    assert loaded.config == model.config
    assert is_stored_in_int8(tmp_path)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    for depth in (1, 3):
        wanted = model.whole_readout(model.depths(torch.tensor([IDS]), depth)[-1])[0]
        assert torch.equal(loaded.logits(IDS, depth), wanted)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "raven" in name])
def test_a_raven_model_loads_as_itself(tmp_path: Path, layout: str) -> None:
    model = model_of(layout)
    save_checkpoint(model, tmp_path, torch.float32)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.logits(IDS), model.whole_readout(model.depths(torch.tensor([IDS]))[-1])[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"initial_state_std": 0.0},
        {"head_dim": 10},
        {"num_heads": 3, "num_kv_heads": 3},
        {"norm_after_loop": True},
        {"norm_before_coda": True},
        {"qkv_bias": True},
        {"activation": "gelu"},
        {"bos_token_id": None, "exit_gate": True},
    ],
)
def test_a_model_that_the_raven_layout_cannot_hold_is_not_written(
    tmp_path: Path, changes: dict[str, Field]
) -> None:
    with pytest.raises(ValueError, match="raven"):
        save_checkpoint(tiny_model(**{**RAVEN, **changes}), tmp_path / "new", torch.float32)
    assert not (tmp_path / "new").exists()


def test_matrices_take_a_byte_a_number_with_a_scale_a_row(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    matrices = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert len(matrices) == 2 * 7 + 2
    assert tensors.keys() == {
        *matrices,
        *(f"{name}_scale" for name in matrices),
        *(name for name in tensors if "norm" in name),
    }
    for name in matrices:
        scales = tensors[f"{name}_scale"]
        assert (scales.shape, scales.dtype) == ((len(tensors[name]), 1), torch.float32)
        assert tensors[name].abs().amax(1).eq(127).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_integers_of_a_loaded_model_are_those_on_disk(tmp_path: Path, layout: str) -> None:
    """By way of fp32 weights, and kept from the disk: with bf16 too, whose rounding would move them."""
    model = model_of(layout)
    save_checkpoint(model, tmp_path, torch.bfloat16, int8=True)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "adapter"}
    wanted = {n: quantized(m.weight) for n, m in linear.items()}
    again = load_model(tmp_path).model
    quantize_linears(again)
    kept = load_model(tmp_path, dtype="bfloat16", int8=True).model
    assert kept.dtype == kept.norm.weight.dtype == torch.bfloat16
    for name, (weight, scales) in wanted.items():
        anew, read = again.get_submodule(name), kept.get_submodule(name)
        assert isinstance(anew, Int8Linear)
        assert isinstance(read, Int8Linear)
        assert torch.equal(anew.weight, weight), name
        assert torch.equal(read.weight, weight), name
        assert torch.allclose(anew.scales, scales, rtol=1e-6)
        assert torch.equal(read.scales, scales)


def test_a_row_down_to_minus_128_is_kept(folder: Path) -> None:
    """Others' scales are the largest / 127.5; rounding such a row anew would change its numbers."""
    weight = load_file(folder / "model.safetensors")[NAME]
    weight[3, 5] = -128
    edit_tensors(folder, **{NAME: weight})
    kept, wanted = load_model(folder, int8=True).logits(IDS), load_model(folder).logits(IDS)
    assert (kept - wanted).abs().max() < 1e-3 * wanted.abs().max()
    held = load_model(folder, int8=True).model.get_submodule(QKV)
    assert isinstance(held, Int8Linear)
    assert torch.equal(held.weight[32:48], weight)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_in_int8_is_loading_and_quantising(tmp_path: Path, tie: bool, dtype: str) -> None:
    """Of a checkpoint in any dtype; the exit gate stays."""
    save_checkpoint(tiny_model(tie_embeddings=tie), tmp_path, getattr(torch, dtype))
    slow = load_model(tmp_path, dtype=dtype)
    quantize_linears(slow.model)
    fast = load_model(tmp_path, dtype=dtype, int8=True)
    assert [type(m) for m in fast.model.modules()] == [type(m) for m in slow.model.modules()]
    assert torch.equal(fast.logits(IDS), slow.logits(IDS))


def test_a_small_mapping_window_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and scales in pieces of a few rows, as those of a large model are."""
    wanted = [load_model(folder, int8=int8).logits(IDS) for int8 in (False, True)]
    monkeypatch.setattr("model.checkpoint.files.BYTES_PER_MAPPING", 100)
    monkeypatch.setattr("model.checkpoint.int8.CHUNK", 2)
    assert torch.equal(load_model(folder).logits(IDS), wanted[0])
    assert torch.equal(load_model(folder, int8=True).logits(IDS), wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flat", [False, True])
def test_scales_of_any_dtype_and_of_both_shapes(folder: Path, dtype: torch.dtype, flat: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    scales = tensors[f"{NAME}_scale"].to(dtype)
    edit_tensors(folder, **{f"{NAME}_scale": scales.flatten() if flat else scales})
    wanted = tensors[NAME] * scales.float()
    assert torch.equal(load_model(folder).model.get_parameter(f"{QKV}.weight")[32:48], wanted)
    assert torch.equal(
        load_model(folder, dtype="bfloat16").model.get_parameter(f"{QKV}.weight")[32:48], wanted.bfloat16()
    )


def test_a_matrix_may_stay_in_floating_point(folder: Path) -> None:
    """As those under `ignore` do."""
    weight = torch.randn(16, 32)
    edit_tensors(folder, **{NAME: weight, f"{NAME}_scale": None})
    assert torch.equal(load_model(folder).model.get_parameter(f"{QKV}.weight")[32:48], weight)
    held = load_model(folder, int8=True).model
    assert torch.equal(held.embedding.weight, load_model(folder).model.embedding.weight)


def test_a_tied_head_that_is_stored_too_is_tied_only_if_it_is_equal(tmp_path: Path) -> None:
    save_checkpoint(model_of("nanbeige_tied"), tmp_path, torch.float32, int8=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("weight", "weight_scale"):
        edit_tensors(tmp_path, **{f"lm_head.{name}": tensors[f"model.embed_tokens.{name}"].clone()})
    for int8 in (False, True):
        assert load_model(tmp_path, int8=int8).config.tie_embeddings
    edit_tensors(tmp_path, **{"lm_head.weight_scale": 2 * tensors["model.embed_tokens.weight_scale"]})
    for int8 in (False, True):
        loaded = load_model(tmp_path, int8=int8)
        assert not loaded.config.tie_embeddings
        embedding, head = loaded.model.embedding.weight, loaded.model.head
        assert isinstance(head, Int8Linear) == int8
        wide = head.weight * head.scales[:, None] if isinstance(head, Int8Linear) else head.weight
        torch.testing.assert_close(wide, 2 * embedding)


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor | None]]


def wrong_scale(value: float) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
        tensors[f"{NAME}_scale"][3] = value
        return {f"{NAME}_scale": tensors[f"{NAME}_scale"]}

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no_scale": (lambda _: {f"{NAME}_scale": None}, f"missing: {NAME}_scale"),
    "no_weight": (lambda _: {NAME: None}, f"missing: {NAME}\n.*unexpected: {NAME}_scale"),
    "a_scale_of_floats": (lambda t: {NAME: t[NAME].float()}, f"unexpected: {NAME}_scale"),
    "a_scale_of_nothing": (lambda _: {"model.x.weight_scale": torch.ones(3)}, "unexpected: model.x.weight_s"),
    "a_scale_a_matrix": (lambda _: {f"{NAME}_scale": torch.ones(1)}, r"shape: .*_scale is \[1\], \[16, 1\]"),
    "a_scale_a_group": (lambda _: {f"{NAME}_scale": torch.ones(16, 2)}, r"_scale is \[16, 2\], \[16, 1\]"),
    "whole_scales": (lambda _: {f"{NAME}_scale": torch.ones(16, 1).int()}, "dtype: .*_scale is I32"),
    "nan": (wrong_scale(torch.nan), "value: 1 of 16 numbers in .*k_proj.weight_scale"),
    "infinity": (wrong_scale(torch.inf), "value: 1 of 16 numbers in .*k_proj.weight_scale"),
    "zero": (wrong_scale(0.0), "value: 1 of 16 numbers in .*k_proj.weight_scale"),
    "negative": (wrong_scale(-1.0), "value: 1 of 16 numbers in .*k_proj.weight_scale"),
    "zero_points": (
        lambda _: {NAME.replace("weight", "weight_zero_point"): torch.zeros(16, 1).to(torch.int8)},
        "unexpected: .*zero_point",
    ),
    "an_int8_norm": (
        lambda t: {"model.norm.weight": torch.ones(32).to(torch.int8)},
        "model.norm.weight is I8;",
    ),
    "int8_of_another_shape": (
        lambda t: {NAME: t[NAME][:, :7].contiguous()},
        rf"shape: {NAME} is \[16, 7\], \[16, 32\]",
    ),
    "int16": (lambda t: {NAME: t[NAME].to(torch.int16)}, f"unexpected: {NAME}_scale\n.*dtype: {NAME} is I16"),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_broken_tensor_is_a_line_of_the_error(folder: Path, damage: Damage, line: str) -> None:
    edit_tensors(folder, **damage(load_file(folder / "model.safetensors")))
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert re.search(line, str(error.value)), error.value
    assert str(error.value).count("\n") == 1 + line.count("\n")
    if "value" not in line:
        with pytest.raises(CheckpointError) as of_headers:
            load_skeleton(folder)
        assert str(of_headers.value) == str(error.value)


def test_everything_that_is_broken_is_listed_at_once_and_is_status_two(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    changes = {
        "model.layers.0.mlp.up_proj.weight_scale": None,
        f"{NAME}_scale": torch.ones(3),
        "model.embed_tokens.weight_scale": -tensors["model.embed_tokens.weight_scale"],
        "model.norm.weight": None,
    }
    edit_tensors(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    kinds = sorted(line.split(":")[0].strip() for line in str(error.value).splitlines()[1:])
    assert kinds == ["missing", "missing", "shape", "value"]
    assert main(["inspect", str(folder)]) == 2
    assert "up_proj.weight_scale" in capsys.readouterr().err


def test_int8_without_a_quantization_config(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert f"dtype: {NAME} is I8" in str(error.value)
    assert f"unexpected: {NAME}_scale" in str(error.value)
    assert "quantization_config" in str(error.value)


def test_another_quantisation_is_refused_before_any_tensor_is_read(folder: Path) -> None:
    fields = int8_fields()["quantization_config"]
    edit_config(folder, quantization_config={**fields, "format": "pack-quantized"})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"quantization_config.format is 'pack-quantized'.*int-quantized"):
        load_model(folder)
