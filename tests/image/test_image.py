"""What `docker build` makes, and that it serves: as nobody, on a file system that can't be written.

Run by scripts/test-image, since it builds an image; the order is that of a container's life.
"""

import json
import re
import shlex
import shutil

import openai
import pytest

from tests.image.containers import STORE, Container, config, layers
from tests.small_checkpoint import write_small_checkpoint

pytestmark = pytest.mark.image

USER = "10001:10001"
MOST_SECONDS = 20  # of all cores together, to the first token
MEGABYTE = 10**6
# A tokenizer of each older form, in a folder of its own, and what it is converted to.
OLDER_TOKENIZERS = """
import json
from pathlib import Path
from sentencepiece import SentencePieceTrainer
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from model.checkpoint.tokenizer import tokenizer_file

lines = ["the water of the river runs down to the sea", "the wind brings rain"] * 20
forms = {name: Path("/cache", name) for name in ("words", "pairs", "pieces")}
for folder in forms.values():
    folder.mkdir()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "water"]
(forms["words"] / "vocab.txt").write_text(chr(10).join(words))
pairs = ByteLevelBPETokenizer()
pairs.train_from_iterator(lines, vocab_size=300)
pairs.save_model(str(forms["pairs"]))
with open(forms["pieces"] / "tokenizer.model", "wb") as file:
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, vocab_size=26)
texts = {}
for name, folder in forms.items():
    tokenizer = Tokenizer.from_file(str(tokenizer_file(folder)))
    texts[name] = tokenizer.decode(tokenizer.encode("the water").ids)
print(json.dumps(texts))
"""


def client_of(container: Container) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{container.url}/v1", api_key="-", max_retries=0)


def test_what_is_not_torch_and_not_the_base_is_small(image: str) -> None:
    base, torch, dependencies, package = layers()
    print("\nsize by layer")
    for name, layer in zip(("base", "torch", "dependencies", "package"), layers(), strict=True):
        print(f"{layer.num_bytes / MEGABYTE:8.0f} MB  {name}")
    print(f"{sum(layer.num_bytes for layer in layers()) / MEGABYTE:8.0f} MB  together")
    assert dependencies.num_bytes + package.num_bytes < 250 * MEGABYTE
    assert torch.num_bytes < 700 * MEGABYTE  # with CUDA it would be several times that
    assert base.num_bytes < 150 * MEGABYTE


def test_the_image_says_how_it_is_run(image: str) -> None:
    said = config()["Config"]
    assert said["User"] == USER
    assert said["Entrypoint"] == ["speed"]
    assert said["Cmd"] == ["serve"]
    assert set(said["ExposedPorts"]) == {"8000/tcp"}
    assert set(said["Volumes"]) == {"/cache"}
    assert "SPEED_HOST=0.0.0.0" in said["Env"]
    assert config()["Healthcheck"]["Test"][0] == "CMD"


def test_the_first_token_comes_soon_and_openais_client_streams(container: Container) -> None:
    with client_of(container) as client:
        chunks = client.completions.create(model="default", prompt="The sky is", max_tokens=24, stream=True)
        first = next(chunk for chunk in chunks if chunk.choices[0].text)
        print(f"\nfirst token after {container.age:.1f} s, {container.busy_seconds():.1f} s of the cores")
        assert container.busy_seconds() < MOST_SECONDS  # the clock would say how busy the machine is
        texts = [first.choices[0].text, *(chunk.choices[0].text for chunk in chunks if chunk.choices)]
    assert len("".join(texts).split()) > 5


def test_a_user_sees_a_few_lines_that_say_what_is_served_where(container: Container) -> None:
    lines = container.logs().replace("\r", "\n").splitlines()
    said = [line for line in lines if line.strip() and "loading" not in line and "POST" not in line]
    print("", *said, sep="\n")
    assert len(said) <= 5
    assert all(re.match(r"(INFO|WARNING):     [\w.]+: ", line) for line in said)
    assert f"default is served at http://localhost:{container.port}" in said[-1]
    assert "no API key is set" in said[0]
    assert "Traceback" not in container.logs()


def test_it_runs_as_nobody_and_writes_nothing_but_its_cache(container: Container) -> None:
    assert container.run("sh", "-c", "echo $(id -u):$(id -g)").stdout.strip() == USER
    for path in ("/", "/tmp", "/opt/speed", "/etc"):
        assert "Read-only" in container.run("touch", f"{path}/file").stderr, path
    assert container.run("touch", "/cache/file").returncode == 0


def test_the_health_check_asks_whether_requests_are_served(container: Container) -> None:
    (_, *command) = config()["Healthcheck"]["Test"]
    assert container.run(*command).returncode == 0
    elsewhere = ["env", "SPEED_PORT=9", *command]
    assert container.run(*elsewhere).returncode != 0


def test_nothing_is_inside_that_serving_does_not_need(container: Container) -> None:
    for program in ("cc", "gcc", "g++", "clang", "zig", "make", "/opt/speed/bin/pip"):
        assert container.run("sh", "-c", f"command -v {program}").returncode, program
    for module in ("bench", "training", "tests", "pytest", "ziglang", "nvidia", "triton", "pip"):
        assert "ModuleNotFoundError" in container.run("python", "-c", f"import {module}").stderr, module
    folders = container.run("find", "/opt/speed", "-type", "d", "-name", "tests").stdout
    assert not folders
    imports = "import torch, sympy, mpmath, networkx, numpy; print(torch.version.cuda)"
    assert container.run("python", "-c", imports).stdout.strip() == "None"


def test_the_compiled_library_is_inside(container: Container) -> None:
    shown = "from model.passes.native.library import choose, load; load(choose())"
    result = container.run("python", "-c", shown)
    assert result.returncode == 0, result.stderr


def test_older_tokenizers_are_converted_by_what_is_left_of_transformers(container: Container) -> None:
    result = container.run("python", "-c", OLDER_TOKENIZERS)
    assert result.returncode == 0, result.stderr
    texts = json.loads(result.stdout.splitlines()[-1])  # the trainers print as well
    assert texts == dict.fromkeys(("words", "pairs", "pieces"), "the water")


def test_a_stop_lets_a_stream_end_and_exits_with_0(container: Container) -> None:
    with client_of(container) as client:
        chunks = client.completions.create(
            model="default",
            prompt="Once upon a time",
            max_tokens=64,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(chunks))
        container.terminate()
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "length"
    assert container.exit_status() == 0


def test_a_model_of_the_hub_is_served_from_a_mounted_cache_to_any_user(image: str) -> None:
    """As `docker run -v "$HOME/.cache/huggingface:/cache"`, with a cache that belongs to somebody else."""
    cache = STORE / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    folder = cache / "hub" / "models--acme--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    write_small_checkpoint(snapshot)
    for file in snapshot.iterdir():
        file.chmod(0o644)  # as the hub's library leaves them
    options = ["--volume", f"{cache}:/cache:ro", "--user", "4321:4321", "--env", "HF_HUB_OFFLINE=1"]
    with Container(*options, command=shlex.split("serve acme/small --kv-cache-tokens 4096")) as running:
        running.wait_ready()
        with client_of(running) as client:
            assert [model.id for model in client.models.list()] == ["acme/small"]
        assert running.run("id", "-u").stdout.strip() == "4321"
        assert "Traceback" not in running.logs()
        running.terminate()
        assert running.exit_status() == 0
