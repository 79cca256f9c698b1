"""lm-eval's `local-completions` against the server: the log-likelihoods of scoring the model directly.

Needs the extra `clients`: lm-eval brings pandas, datasets and more, too much for every run of the tests.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from model import LoadedModel, load_model
from server.tokenizer import TextCodec
from tests.clients.checks import Server
from tests.clients.with_lm_eval import TOLERANCE, evaluate
from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


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
    own = Server(server.url, checkpoint, tmp_path)
    samples = evaluate(own, "local-completions", "/v1/completions")
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
