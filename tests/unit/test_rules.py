"""What a request may ask: every rule names its field, value and limit, and the server asks the same ones."""

from collections.abc import Sequence
from typing import cast

import msgspec
import pytest

from model.protocol import EngineInfo, GenerationRequest, Grammar, SamplingParams
from model.rules import RuleError, check_request
from server.errors import InvalidRequestError
from server.planning import ANYONE, _check_asked, _options
from server.schemas.completions import CompletionRequest
from server.tokenizer import TextCodec
from tests.loose import Field

INFO = EngineInfo(
    family="test",
    vocab_size=50,
    max_model_len=16,
    num_loops=4,
    draft_depths=[1],
    eos_token_ids=[0],
    device="cpu",
    dtype="float32",
    kv_cache_tokens=64,
    max_num_seqs=2,
    draft_policies=["single", "lookup"],
    grammar_problem="a grammar needs a tokenizer",
)
GOOD = GenerationRequest(request_id="r", prompt_token_ids=[0, 49], max_tokens=14, sampling=SamplingParams())
BROKEN = [
    ({"prompt_token_ids": []}, "prompt_token_ids", ["empty", "at least one"]),
    ({"prompt_token_ids": [3, 50]}, "prompt_token_ids", ["50", "0 to 49"]),
    ({"prompt_token_ids": [-1]}, "prompt_token_ids", ["-1", "0 to 49"]),
    ({"max_tokens": 15}, "max_tokens", ["2 prompt tokens", "15", "16"]),
    ({"max_tokens": -1}, "max_tokens", ["-1", "at least 0"]),
    ({"num_loops": 5}, "num_loops", ["5", "4 loops"]),
    ({"num_loops": 0}, "num_loops", ["0", "4 loops"]),
    ({"init_scale": 0.5}, "init_scale", ["0.5", "noise"]),
    ({"draft_policy": "best"}, "draft_policy", ["'best'", "single, lookup"]),
    ({"stop_token_ids": [50]}, "stop_token_ids", ["50", "0 to 49"]),
    ({"sampling": SamplingParams(logit_bias={77: 1.0})}, "logit_bias", ["77", "0 to 49"]),
    ({"grammar": Grammar(kind="json_object")}, "grammar", ["tokenizer"]),
    ({"loop_logprobs": 64}, "loop_logprobs", ["64", "4 loops", "260", "256"]),
    ({"exit_threshold": 0.25}, "exit_threshold", ["0.25", "no exit gate"]),
]


class NoText:
    """A codec of a model whose requests stop at no text."""

    def special_stops(self, strings: Sequence[str]) -> list[int]:
        return []


def test_what_the_model_has_may_be_asked_for() -> None:
    all_it_has = {"num_loops": 4, "draft_policy": "lookup", "stop_token_ids": [0, 49]}
    check_request(msgspec.structs.replace(GOOD, **all_it_has), INFO)


@pytest.mark.parametrize(("asked", "field", "words"), BROKEN)
def test_a_broken_rule_names_field_value_and_limit(
    asked: dict[str, object], field: str, words: list[str]
) -> None:
    with pytest.raises(RuleError) as broken:
        check_request(msgspec.structs.replace(GOOD, **asked), INFO)
    assert broken.value.field == field
    assert not [word for word in (field, *words) if word not in str(broken.value)]


OF_BODIES = [
    {"num_loops": 5},
    {"init_scale": 0.5},
    {"draft_policy": "best"},
    {"stop_token_ids": [50]},
    {"exit_threshold": 0.5},
]


@pytest.mark.parametrize("asked", OF_BODIES)
def test_the_server_refuses_an_option_in_the_engines_words(asked: dict[str, Field]) -> None:
    with pytest.raises(RuleError) as engines:
        check_request(msgspec.structs.replace(GOOD, **asked), INFO)
    body = CompletionRequest(model="m", prompt=[1], **asked)
    with pytest.raises(InvalidRequestError) as servers:
        _check_asked(body, _options(body, cast(TextCodec, NoText()), INFO, ANYONE), INFO)
    assert (servers.value.message, servers.value.param) == (str(engines.value), engines.value.field)
