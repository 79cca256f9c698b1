"""`speed serve FOLDER`: one without a tokenizer is served, a wrong one is one error and exit status 2."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_model, save_checkpoint
from tests.e2e.conftest import ServerProcess
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(tiny_model(), folder, torch.float32)
    return folder


@torch.inference_mode()
def test_a_folder_without_a_tokenizer_is_served_by_ids(folder: Path) -> None:
    model = load_model(folder).model
    ids = [3, 1, 4]
    for _ in range(12):
        ids.append(int(model.whole_readout(model.depths(torch.tensor([ids]))[-1])[0, -1].argmax()))
    with ServerProcess(str(folder)) as server:
        fields = {"model": folder.name, "prompt": ids[:3], "max_tokens": 12, "ignore_eos": True}
        (choice,) = server.complete(**fields, return_token_ids=True).json()["choices"]
        assert choice["token_ids"] == ids[3:]
        assert server.complete(**{**fields, "prompt": "text"}).json()["error"]["code"] == "no_tokenizer"
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == folder.name


def missing_tensor(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    return "missing: model.layers.1.mlp.up_proj.weight"


def unknown_architecture(folder: Path) -> str:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["BertModel"]}))
    return "architectures is ['BertModel']"


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def only_a_pickle(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    return "pytorch_model.bin is a pickle"


def no_template(folder: Path) -> str:
    (folder / "tokenizer_config.json").write_text('{"chat_template": 5}')
    return "chat_template"


DAMAGES = [missing_tensor, unknown_architecture, only_a_pickle, no_template]


def test_a_wrong_checkpoint_is_one_error_and_exit_status_two(folder: Path, tmp_path: Path) -> None:
    def outcome(damage: Callable[[Path], str]) -> tuple[str, int, str]:
        broken = tmp_path / damage.__name__
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        expected = damage(broken)
        server = ServerProcess(str(broken))
        _, error = server.process.communicate(timeout=120)
        return expected, server.process.returncode, error

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(outcome, DAMAGES))
    for expected, status, error in outcomes:
        assert expected in error
        assert status == 2
        assert error.count("speed: error:") == 1
        assert "Traceback" not in error
        assert "unpickled" not in error
