"""lm-eval's `local-completions` against the server: the log-likelihoods of scoring the model directly.

Needs the extra `clients`: lm-eval brings pandas, datasets and more, too much for every run of the tests.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import LoadedModel, load_model
from server.tokenizer import TextCodec
from tests.e2e.conftest import ServerProcess
from tests.loose import Json

TASK = Path(__file__).parent / "lm_eval_task"
TOLERANCE = 1e-4  # nats, of the sum over a continuation, in fp32

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


def run_lm_eval(server: ServerProcess, checkpoint: Path, folder: Path) -> list[dict[str, Json]]:
    """The samples that lm-eval logs, one a document."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    task = (TASK / "next_lines.yaml").read_text().replace("${DATA}", str(TASK / "next_lines.jsonl"))
    (folder / "next_lines.yaml").write_text(task)
    args = (
        f"model=default,base_url={server.url}/v1/completions,tokenizer={folder},tokenizer_backend=huggingface"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--tasks",
        "next_lines",
    ]
    command += ["--model_args", args, "--batch_size", "5"]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def scored(codec: TextCodec, model: LoadedModel, context: str, ending: str) -> tuple[float, bool]:
    """Log-likelihood of `ending` behind `context`, and whether greedy decoding would write it."""
    before = codec.encode(context.rstrip())  # lm-eval's way to split tokens, blanks and merges included
    begin, ids = len(before), before + codec.encode(context + ending)[len(before) :]
    logprobs = torch.log_softmax(torch.as_tensor(model.logits(ids)), -1)
    rows = range(begin - 1, len(ids) - 1)
    greedy = all(int(logprobs[row].argmax()) == ids[row + 1] for row in rows)
    return sum(float(logprobs[row, ids[row + 1]]) for row in rows), greedy


def test_log_likelihoods_are_those_of_the_model(
    server: ServerProcess, checkpoint: Path, tmp_path: Path
) -> None:
    """Echo, log-probabilities and prompts of token ids, five to a request."""
    samples = run_lm_eval(server, checkpoint, tmp_path)
    codec, model = TextCodec.from_folder(checkpoint), load_model(checkpoint)
    differences = []
    for sample in samples:
        for ending, ((given, is_greedy),) in zip(sample["doc"]["endings"], sample["resps"], strict=True):
            expected, greedy = scored(codec, model, sample["doc"]["context"], ending)
            differences.append(abs(float(given) - expected))
            assert (str(is_greedy) == "True") == greedy
    print("largest difference:", max(differences), "of", len(differences))
    assert len(differences) == 16
    assert max(differences) < TOLERANCE
