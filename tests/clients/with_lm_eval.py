"""lm-eval: `local-completions` on a task whose data are in this repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.checks import MODEL, Server
from tests.loose import Json

TASK = Path(__file__).resolve().parents[1] / "e2e" / "lm_eval_task"
TOLERANCE = 1e-4  # nats, of the sum over a continuation


def evaluate(server: Server, kind: str, path: str) -> list[dict[str, Json]]:
    """The samples that lm-eval logs, one a document."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(server.checkpoint / name, server.folder)
    task = (TASK / "next_lines.yaml").read_text().replace("${DATA}", str(TASK / "next_lines.jsonl"))
    (server.folder / "next_lines.yaml").write_text(task)
    model = {"model": MODEL, "base_url": server.url + path, "tokenizer": str(server.folder)}
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        kind,
        "--tasks",
        "next_lines",
        "--log_samples",
    ]
    command += [
        "--model_args",
        ",".join(f"{name}={value}" for name, value in model.items()),
        "--batch_size",
        "5",
    ]
    command += ["--include_path", str(server.folder), "--output_path", str(server.folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **offline, "HF_HOME": str(server.folder / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (server.folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def scored(server: Server, context: str, ending: str) -> float:
    """The log-likelihood of `ending` behind `context`, by the scores of a prompt of token ids."""
    before = server.post("/tokenize", prompt=context.rstrip(), add_special_tokens=False)["tokens"]
    both = server.post("/tokenize", prompt=context + ending, add_special_tokens=False)["tokens"]
    ids = before + both[len(before) :]  # lm-eval's way to split tokens
    body = server.post("/v1/completions", prompt=ids, max_tokens=1, prompt_logprobs=0)
    scores = body["choices"][0]["prompt_logprobs"]
    return float(sum(scores[i][str(ids[i])]["logprob"] for i in range(len(before), len(ids))))


def check_log_likelihoods(server: Server) -> None:
    """A multiple-choice task by `local-completions`: log-likelihoods as by `prompt_logprobs` within 1e-4"""
    differences = []
    for sample in evaluate(server, "local-completions", "/v1/completions"):
        for ending, ((given, _),) in zip(sample["doc"]["endings"], sample["resps"], strict=True):
            differences.append(abs(float(given) - scored(server, sample["doc"]["context"], ending)))
    assert len(differences) == 16
    assert max(differences) < TOLERANCE, max(differences)
