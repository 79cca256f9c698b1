"""Writers of responses and messages: whatever is said, however it is cut, streamed and whole are the same."""

import json
from types import SimpleNamespace
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from server.choices import ChoiceDelta, join_deltas
from server.formats.messages import MessagesFormat
from server.formats.responses import ResponsesFormat
from server.output.pieces import CallArguments, CallStart, ContentText, Piece, ReasoningText
from server.schemas.messages import MessagesRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.usage import CompletionTokensDetails, PromptTokensDetails, Usage
from tests.loose import Json
from tests.text_tools import byte_codec

USAGE = Usage(
    prompt_tokens=5,
    completion_tokens=7,
    total_tokens=12,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=2),
    completion_tokens_details=CompletionTokensDetails(
        accepted_prediction_tokens=1, rejected_prediction_tokens=1, decode_passes=3
    ),
)
PARTS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4)


class Said(NamedTuple):
    """Something that a model says: a text, thoughts or a call, in parts."""

    kind: str
    parts: list[str]


SAYINGS = st.lists(st.builds(Said, st.sampled_from(["text", "thought", "call"]), PARTS), max_size=6)


def pieces_of(sayings: list[Said]) -> list[Piece]:
    """As parsers give them: calls are numbered, and none goes on after another has begun."""
    pieces: list[Piece] = []
    num_calls = 0
    for saying in sayings:
        if saying.kind == "call":
            arguments = json.dumps({"a": "".join(saying.parts)})
            pieces.append(CallStart(num_calls, f"call_{num_calls}", "f"))
            half = len(arguments) // 2
            pieces += [CallArguments(num_calls, part) for part in (arguments[:half], arguments[half:])]
            num_calls += 1
        else:
            kind = ContentText if saying.kind == "text" else ReasoningText
            pieces += [kind(part) for part in saying.parts]
    return pieces


def deltas_of(pieces: list[Piece], cuts: set[int], reason: Json) -> list[ChoiceDelta]:
    """The pieces in deltas that end behind the pieces of those numbers; the last delta may have none."""
    deltas: list[ChoiceDelta] = []
    waiting: list[Piece] = []
    for number, piece in enumerate(pieces):
        waiting.append(piece)
        if number in cuts:
            deltas.append(ChoiceDelta(0, "", [], [], pieces=waiting))
            waiting = []
    return [*deltas, ChoiceDelta(0, "", [], [], reason, None, waiting)]


def generation(max_tokens: int = 9) -> Json:
    return SimpleNamespace(
        fields=SimpleNamespace(temperature=1.0, top_p=1.0),
        plan=SimpleNamespace(
            prompts=[SimpleNamespace(token_ids=[1] * 5)], requests=[SimpleNamespace(max_tokens=max_tokens)]
        ),
        choices=[SimpleNamespace(thoughts_end=0)],
    )


def dumped(events: Json) -> list[dict[str, Json]]:
    return [json.loads(event.model_dump_json(exclude_unset=True)) for event in events]


def without_ids(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: without_ids(part) for name, part in value.items() if not name.endswith(("id", "_at"))}
    return [without_ids(part) for part in value] if isinstance(value, list) else value


@given(SAYINGS, st.sets(st.integers(0, 30)), st.sampled_from(["stop", "tool_calls", "length", "abort"]))
def test_responses(sayings: list[Said], cuts: set[int], reason: str) -> None:
    body = ResponsesRequest.model_validate({"model": "m", "input": "hi"})
    deltas = deltas_of(pieces_of(sayings), cuts, reason)
    writer = ResponsesFormat(body, generation(), byte_codec())
    events = dumped([*writer.begin(), *(event for delta in deltas for event in writer.add(delta))])
    events += dumped(writer.end(USAGE))
    whole = ResponsesFormat(body, generation(), byte_codec()).whole([join_deltas(deltas)], USAGE)
    last = events[-1]
    assert without_ids(last["response"]) == without_ids(dumped([whole])[0])
    assert last["type"] == f"response.{last['response']['status']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    texts = [
        item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        for item in last["response"]["output"]
    ]
    told = ["" for _ in texts]
    for event in events:
        if "delta" in event:
            told[event["output_index"]] += event["delta"]
    assert told == texts
    calls = [item for item in last["response"]["output"] if item["type"] == "function_call"]
    assert len(calls) == sum(saying.kind == "call" for saying in sayings)


@given(SAYINGS, st.sets(st.integers(0, 30)), st.sampled_from(["stop", "tool_calls", "length"]))
def test_messages(sayings: list[Said], cuts: set[int], reason: str) -> None:
    body = MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    )
    deltas = deltas_of(pieces_of(sayings), cuts, reason)
    writer = MessagesFormat(body, generation(), "id")
    events = dumped(event for delta in deltas for event in writer.add(delta))
    end, stop = dumped(writer.end(USAGE))[-2:]
    whole = dumped([MessagesFormat(body, generation(), "id").whole([join_deltas(deltas)], USAGE)])[0]
    assert (end["delta"]["stop_reason"], end["usage"]) == (whole["stop_reason"], whole["usage"])
    assert stop == {"type": "message_stop"}
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in blocks] == [block["type"] for block in whole["content"]]
    texts = ["" for _ in blocks]
    for event in events:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            texts[event["index"]] += delta.get("text", delta.get("thinking", delta.get("partial_json", "")))
    for block, text in zip(whole["content"], texts, strict=True):
        said = block["input"] if block["type"] == "tool_use" else block.get("text", block.get("thinking"))
        assert said == (json.loads(text) if block["type"] == "tool_use" else text)


def test_a_cut_input_is_what_came_of_it() -> None:
    body = MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    )
    for text, expected in (('{"a": "b', {"a": "b"}), ("{", {}), ("", {}), ('{"a": [1, 2', {"a": [1, 2]})):
        pieces: list[Piece] = [CallStart(0, "c", "f"), CallArguments(0, text)]
        delta = ChoiceDelta(0, "", [], [], "length", None, pieces)
        (block,) = dumped([MessagesFormat(body, generation(), "id").whole([delta], USAGE)])[0]["content"]
        assert block["input"] == expected


def test_why_a_message_ends_where_the_context_does() -> None:
    body = MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    )
    delta = ChoiceDelta(0, "", [], [], "length", None, [ContentText("a")])
    for allowed, reason in ((9, "max_tokens"), (8, "model_context_window_exceeded")):
        message = MessagesFormat(body, generation(allowed), "id").whole([delta], USAGE)
        assert message.stop_reason == reason
