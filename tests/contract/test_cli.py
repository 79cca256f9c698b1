"""The command line: one source of options, one clear line for each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import server.command
from cli.main import UsageError, build_parser, main
from server.auth import load_api_keys
from server.command import read_settings
from server.settings import Settings, SettingsError, check_variables, unknown_variables


def settings_of(*argv: str) -> Settings:
    command = ["serve", *argv]
    return read_settings(build_parser(command).parse_args(command))


def test_flag_over_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of().port == 8000
    monkeypatch.setenv("SPEED_PORT", "81")
    monkeypatch.setenv("SPEED_DRAFT_DEPTHS", "1, 2")
    monkeypatch.setenv("SPEED_SERVED_MODEL_NAME", "a,b")
    assert (settings_of().port, settings_of().draft_depths) == (81, (1, 2))
    assert settings_of().model_names == ["a", "b"]
    assert settings_of("--port", "82", "--draft-depths", "3").port == 82
    assert settings_of("--draft-depths", "3").draft_depths == (3,)
    assert settings_of("--allow-unknown-fields").allow_unknown_fields is True


def test_names_of_the_model() -> None:
    assert settings_of().model_names == ["default"]
    assert settings_of("--model", "/models/raven").model_names == ["raven"]
    assert settings_of("--model", "ByteDance/Ouro-1.4B").model_names == ["ByteDance/Ouro-1.4B"]
    assert settings_of("--served-model-name", "x,y").model_names == ["x", "y"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--port", "70000"], ["--port", "70000", "65535"]),
        (["--port", "http"], ["--port", "http"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--draft-depths", "2,1"], ["--draft-depths", "2,1", "ascend"]),
        (["--draft-depths", "0"], ["--draft-depths", "0"]),
        (["--served-model-name", "a,,b"], ["--served-model-name"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "0", "1"]),
        (["--model", "/no/such/folder"], ["--model", "/no/such/folder"]),
        (["/no/such/folder"], ["/no/such/folder"]),
        (["one", "--model", "another"], ["twice", "one", "another"]),
        (["--model", ".", "--revision", "v1"], ["revision", "v1"]),
    ],
)
def test_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]
) -> None:
    assert main(["serve", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error


def test_mistake_in_the_environment_names_the_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEED_PORT", "-1")
    assert main(["serve"]) == 2
    assert "SPEED_PORT" in capsys.readouterr().err


def test_folder_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_chat_template_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--chat-template", "/no/such/file"]) == 2
    assert "/no/such/file" in capsys.readouterr().err


def test_help_names_every_option_and_imports_no_framework() -> None:
    code = (
        "import sys, cli.main\n"
        "try: cli.main.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'fastapi', 'uvicorn', 'starlette'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    for name in Settings.model_fields:
        flag = "--api-key" if name == "api_keys" else "--" + name.replace("_", "-")
        assert f"  {flag}" in result.stdout
        assert f"SPEED_{name.upper()}" in result.stdout


def test_a_hub_id_is_served_from_the_cache_under_its_own_name(tmp_path: Path) -> None:
    """The layout of huggingface_hub's cache, without a network; in a process of its own for its variables."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes(b"{}")
    code = (
        "from cli.main import build_parser\n"
        "from server.command import local_model, read_settings\n"
        "command = ['serve', '--model', 'org/name']\n"
        "settings = local_model(read_settings(build_parser(command).parse_args(command)))\n"
        "print(settings.model, *settings.model_names)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stdout.split() == [str(snapshot), "org/name"]


def test_sizes_and_budgets_are_numbers_with_units_or_words() -> None:
    assert settings_of("--kv-cache-memory", "512MiB").kv_cache_memory == 512 * 2**20
    assert settings_of("--kv-cache-memory", "4096").kv_cache_memory == 4096
    assert settings_of("--row-budget", "12").row_budget == 12
    assert settings_of().row_budget == "auto"
    for flag, value in (("--kv-cache-memory", "3TB"), ("--row-budget", "0"), ("--row-budget", "many")):
        with pytest.raises(UsageError, match=f"{flag} {value} is not valid"):
            settings_of(flag, value)


@pytest.mark.parametrize("link", ["tcp://10.96.12.7:8000", "udp://10.96.12.7:8000"])
def test_a_service_of_kubernetes_changes_no_option(monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """A Service named "speed" gives every pod beside it SPEED_PORT and more."""
    monkeypatch.setenv("SPEED_PORT", link)
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_80_TCP", "PORT_80_TCP_ADDR"):
        monkeypatch.setenv(f"SPEED_{name}", "x")
    assert settings_of().port == 8000
    assert settings_of("--port", "81").port == 81
    assert unknown_variables() == []
    with pytest.raises(UsageError, match="--port"):
        settings_of("--port", link)


@pytest.mark.parametrize("name", ["SPEED_API_KEYS", "SPEED_API_KEY_FILE"])
@pytest.mark.parametrize("value", ["", " ", ",", "a,,b"])
def test_an_empty_key_is_an_error_and_not_no_key(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises((UsageError, SettingsError), match="--api-key"):
        load_api_keys(settings_of())


def test_a_variable_that_is_nearly_that_of_the_keys_does_not_open_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPEED_API_KEY", "secret")
    with pytest.raises(SettingsError, match="SPEED_API_KEYS") as caught:
        check_variables()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SPEED_MAX_NUM_SEQ", "3")
    assert unknown_variables() == ["SPEED_API_KEY", "SPEED_MAX_NUM_SEQ"]


@pytest.mark.parametrize("command", [["cli.main"], ["server"]])
def test_the_version(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command, "--version"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("speed ")


def test_the_module_takes_the_options_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert server.command.main(["--port", "http"]) == 2
    assert "--port http" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    assert not ended.value.code
    script = capsys.readouterr().out
    for flag in ("--max-header-bytes", "--kv-cache-memory", "inspect", "throughput"):
        assert flag in script


def test_ctrl_c_before_anything_is_served_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.command, "local_model", interrupted)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == ""
