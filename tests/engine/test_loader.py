"""Loading a checkpoint folder: all of it, as it is on disk, or one clear error; and writing one."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_config, load_model, save_checkpoint
from model.checkpoint.files import CheckpointError
from model.machine import Memory
from model.network.config import LoopedConfig, NormPlacement, RopeConfig
from model.network.looped import LoopedTransformer
from tests.checkpoint_edits import edit_config, edit_tensors
from tests.loose import Field, Json

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def tiny(**fields: Field) -> LoopedTransformer:
    """A looped model with random weights, norms and biases included."""
    torch.manual_seed(1)
    shape = {
        "family": "nanbeige",
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 10,
        "num_block_layers": 2,
        "num_loops": 3,
        "max_positions": 64,
    }
    model = LoopedTransformer(LoopedConfig(**{**shape, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 0.4)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tiny(), tmp_path, torch.float32)
    return tmp_path


def shard(folder: Path) -> dict[str, str]:
    """Splits a single file into two shards with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
    for file, content in shards.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in shards.items() for name in content}
    write_index(folder, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return weight_map


def write_index(folder: Path, content: Json) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    for part in parts:
        assert re.search(part, str(error.value)), f"{part!r} is not in: {error.value}"
    return str(error.value)


MODELS = {
    "plain": {},
    "norm_after_loop": {"norm_after_loop": True},
    "tied": {"tie_embeddings": True},
    "attention_bias": {"qkv_bias": True, "output_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "one_kv_head": {"num_kv_heads": 1},
    "yarn": {"rope": RopeConfig(kind="yarn", factor=2.0, original_max_positions=32)},
    "gelu": {"activation": "gelu"},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_a_saved_model_loads_as_itself(tmp_path: Path, fields: dict[str, Field]) -> None:
    model = tiny(**fields)
    save_checkpoint(model, tmp_path, torch.float32)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    model.requires_grad_(False)  # attention that is trained through is another implementation
    for depth in (1, 3):
        wanted = model.whole_readout(model.depths(torch.tensor([IDS]), depth)[-1])[0]
        assert torch.equal(loaded.logits(IDS, depth), wanted)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_placement": NormPlacement.SANDWICH},
        {"num_prelude_layers": 1},
        {"input_injection": True},
        {"qkv_bias": True},
        {"rope": RopeConfig(interleaved=True)},
        {"rope": RopeConfig(rotary_dim=4)},
        {"embedding_scale": 2.0},
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_not_written(tmp_path: Path, fields: dict[str, Field]) -> None:
    with pytest.raises(ValueError, match="layout"):
        save_checkpoint(tiny(**fields), tmp_path / "new", torch.float32)
    assert not (tmp_path / "new").exists()


def test_sharded_equals_whole(folder: Path) -> None:
    wanted = load_model(folder).logits(IDS)
    shard(folder)
    assert torch.equal(load_model(folder).logits(IDS), wanted)


def test_a_small_mapping_window_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is opened anew after every 64 MiB: at 200 bytes, for nearly each tensor."""
    wanted = load_model(folder).logits(IDS)
    monkeypatch.setattr("model.checkpoint.files.BYTES_PER_MAPPING", 200)
    assert torch.equal(load_model(folder).logits(IDS), wanted)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_any_stored_dtype_is_cast_to_the_wanted_one(
    folder: Path, stored: torch.dtype, wanted: str | torch.dtype
) -> None:
    tensors = {n: t.to(stored) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder, dtype=wanted).model
    dtype = wanted if isinstance(wanted, torch.dtype) else getattr(torch, wanted)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(model.get_parameter("norm.weight"), tensors["model.norm.weight"].to(dtype))


def test_auto_is_float32_on_the_cpu(tmp_path: Path) -> None:
    save_checkpoint(tiny(), tmp_path, torch.bfloat16)
    assert load_model(tmp_path).model.dtype == torch.float32


def test_a_loaded_model_is_for_inference(folder: Path) -> None:
    model = load_model(folder).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    save_checkpoint(tiny(tie_embeddings=True), tmp_path, torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path).model
    assert model.head.weight is model.embedding.weight


def test_rotary_buffers_of_old_checkpoints_are_dropped(folder: Path) -> None:
    wanted = load_model(folder).logits(IDS)
    edit_tensors(folder, **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert torch.equal(load_model(folder).logits(IDS), wanted)


def test_every_wrong_name_is_listed_at_once(folder: Path) -> None:
    edit_tensors(
        folder,
        **{
            "model.norm.weight": None,
            "lm_head.weight": None,
            "model.layers.0.self_attn.k_proj.weight": torch.ones(21, 24),
            "model.layers.1.mlp.up_proj.weight": torch.ones(24, 32),
            "model.layers.1.self_attn.q_proj.bias": torch.ones(40),
            "model.layers.2.input_layernorm.weight": torch.ones(24),
            "model.embed_tokens.weight": torch.ones(40, 24, dtype=torch.int32),
        },
    )
    message = refused(
        folder,
        "missing: model.norm.weight",
        "missing: lm_head.weight",
        r"shape: .*0.self_attn.k_proj.weight is \[21, 24\], \[20, 24\]",
        r"shape: .*1.mlp.up_proj.weight is \[24, 32\], \[32, 24\]",
        "unexpected: model.layers.1.self_attn.q_proj.bias",
        "unexpected: model.layers.2.input_layernorm.weight",
        "dtype: model.embed_tokens.weight is I32",
        re.escape(str(folder)),
    )
    assert message.count("\n") == 7


def test_a_config_of_other_sizes_than_the_weights(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    refused(folder, "missing: model.layers.2.self_attn.v_proj.weight")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 2**30},
        {"hidden_size": 2**31 - 1},
        {"head_dim": 2**30},
        {"hidden_size": 2**31 - 1, "num_attention_heads": 2**20, "intermediate_size": 2**31 - 1},
    ],
)
def test_absurd_sizes_are_an_error_at_once(folder: Path, fields: dict[str, Field]) -> None:
    """A layer count of 10^9 would be built, layer by layer, until memory ran out."""
    edit_config(folder, **fields)
    refused(folder, "config.json")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    refused(folder, re.escape(str(path)), "damaged")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json" * 50)
    refused(folder, "model.safetensors is damaged")


def test_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()
    refused(folder, r"model-2.safetensors is missing")


def test_an_index_that_names_absent_tensors(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, {"weight_map": {**weight_map, "model.ghost": "model-1.safetensors"}})
    refused(folder, "index.json names tensors", "model.ghost")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_a_useless_index(folder: Path, content: dict[str, Field]) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, content)
    refused(folder, "index.json")


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    save_checkpoint(tiny(), tmp_path / "other", torch.float32)
    save_checkpoint(tiny(), tmp_path / "one", torch.float32)
    (tmp_path / "one" / "model.safetensors").unlink()
    write_index(tmp_path / "one", {"weight_map": {"model.norm.weight": "../other/model.safetensors"}})
    refused(tmp_path / "one", "not the name of a file in the same folder")


def test_a_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{", b"[" * 100_000])
def test_a_config_that_is_not_an_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickle_is_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pytorch_model.bin is a pickle")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "holds neither")


def test_an_unknown_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"BertForMaskedLM.*NanbeigeForCausalLM"):
        load_config(folder)


@pytest.mark.parametrize("name", ["Nanbeige/Nanbeige4.2-3B", "", "/nowhere/at/all"])
def test_a_name_that_is_not_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = "local folder" if name else "config.json is missing"
    with pytest.raises(CheckpointError, match=message):
        load_model(name)


@pytest.mark.parametrize("dtype", ["float64", "int8", "half please", torch.int64])
def test_an_unknown_dtype(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="auto, float32, bfloat16, float16"):
        load_model(folder, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="gpu"):
        load_model(folder, device="gpu")
    with pytest.raises(ValueError, match="CUDA"):
        load_model(folder, device="cuda")


@pytest.mark.parametrize(
    ("ids", "loops", "limit"),
    [
        ([], None, "1 to 64"),
        ([0] * 65, None, "1 to 64"),
        ([40], None, "0 to 39"),
        ([-1], None, "0 to 39"),
        ([1], 0, "1 to 3"),
        ([1], 4, "1 to 3"),
    ],
)
def test_inputs_out_of_range_are_errors_with_the_limit(
    folder: Path, ids: list[int], loops: int | None, limit: str
) -> None:
    with pytest.raises(ValueError, match=limit):
        load_model(folder).logits(ids, loops)


def test_an_initial_state_needs_input_injection(folder: Path) -> None:
    with pytest.raises(ValueError, match="initial_state"):
        load_model(folder).logits([1], 1, torch.zeros(1, 24))


def test_importing_the_package_imports_no_torch() -> None:
    """The API process imports message types from here; torch would add seconds and 200 MB to it."""
    code = "import model, sys; assert 'torch' not in sys.modules; from model import load_model"
    subprocess.run([sys.executable, "-c", code], check=True)


MEASURE = """
import sys
from model import load_model

def memory(kind):
    with open("/proc/self/status", encoding="ascii") as file:
        status = file.read()
    return int(status.split(kind + ":")[1].split()[0]) * 1024

load_model(sys.argv[1])  # what torch imports on first use is not the loader's
before = memory("VmRSS")
load_model(sys.argv[2])
print(memory("VmHWM") - before)
"""


def test_where_loading_takes_long_it_says_how_far_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model.checkpoint.loader.SECONDS_BETWEEN_LINES", 0)
    load_model(folder)
    error = capsys.readouterr().err
    assert re.search(r"loading: +9\d%", error)
    assert "B/s" in error


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_little_more_than_the_weights(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One file of 170 MB: mapping all of it at once, or a second copy, would peak at twice that."""
    model = tiny(hidden_size=512, intermediate_size=4096, num_block_layers=6)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    large = tmp_path_factory.mktemp("large")
    save_checkpoint(model, large, torch.float32)
    command = [sys.executable, "-W", "error", "-c", MEASURE, str(folder), str(large)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert size < int(done.stdout) < 1.15 * size + 64 * 2**20
    assert done.stderr == ""  # no progress bar where nobody looks


def test_weights_that_memory_does_not_hold_are_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel kills such a process without a word."""
    load_model(folder)
    assert not caplog.records
    monkeypatch.setattr("model.checkpoint.loader.free_memory", lambda: Memory(1000, True))
    load_model(folder)
    assert "the process may be killed" in caplog.text


def test_room_for_more_loops_is_made_only_where_the_family_is_trained_for_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"max_loops is 4, but this nanbeige model is trained for 3 loops"):
        load_model(folder, max_loops=4)
    with pytest.raises(ValueError, match="max_loops is 2; it must be at least num_loops, 3"):
        load_model(folder, max_loops=2)
    assert load_model(folder, max_loops=3).config.most_loops == 3


@pytest.mark.parametrize(("algorithm", "reason"), [("NVFP4", "NVFP4 are not read"), ("FP8", "only as")])
def test_an_export_that_says_in_a_file_of_its_own_how_it_is_quantised_is_refused(
    folder: Path, algorithm: str, reason: str
) -> None:
    raw = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
    (folder / "hf_quant_config.json").write_text(json.dumps(raw))
    refused(folder, "hf_quant_config", reason)
