"""Tools in chats: what the model is told, what clients get, and what is refused in words."""

import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from model.grammar.check import check_grammar
from server.app import create_app
from server.chat_template import ChatTemplate
from server.settings import Settings, SettingsError
from server.tokenizer import TextCodec
from tests.contract.conftest import Served, serving, until
from tests.contract.test_chat import answer, chat, chunks
from tests.contract.test_errors import error_of
from tests.fake_engine import EOS, INFO, FakeEngine
from tests.loose import Field, Json
from tests.text_tools import byte_codec, byte_tokenizer, ids_of

TEMPLATE = """\
{% if tools %}T{{ tools | tojson }}<tool_call>;{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}\
{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}\
</tool_call>{% endfor %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}{% if think %}<think>
{% endif %}"""
BARE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}a:"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "get_weather", **fields: Json) -> dict[str, Json]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS} | fields}


def call(city: str = "Oslo", name: str = "get_weather") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'city': city}})}\n</tool_call>"


USER = [{"role": "user", "content": "Weather?"}]
TOOLS = [tool(), tool("get_time", description="The <time>.")]
ASKING: dict[str, Json] = {"messages": USER, "tools": TOOLS, "max_tokens": 500}
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def talking(
    text: str | Callable[[int], str],
    template: str = TEMPLATE,
    *,
    tokens_per_event: int = 1,
    describes_tools: bool = False,
    info: Json = None,
    **options: Field,
) -> AbstractAsyncContextManager[Served]:
    """A server whose model says `text`, or what it says as choice i."""
    say = text if callable(text) else lambda _: text
    engine = FakeEngine(
        lambda request: [*ids_of(say(int(request.request_id.rpartition("-")[2]))), EOS],
        tokens_per_event=tokens_per_event,
        info=info or msgspec.structs.replace(INFO, max_model_len=4000),
    )
    chat_template = ChatTemplate(template, describes_tools=describes_tools)
    return serving(engine, chat_template=chat_template, **options)


def prompt_of(served: Served) -> str:
    return bytes(served.engine.requests[-1].prompt_token_ids).decode()


def joined_messages(parts: list[dict[str, Json]]) -> dict[int, dict[str, Json]]:
    """The choices of a stream in the shape of whole ones, ids of calls left out."""
    choices: dict[int, dict[str, Json]] = {}
    for part in (choice for chunk in parts for choice in chunk["choices"]):
        choice = choices.setdefault(part["index"], {"message": {}, "logprobs": [], "token_ids": []})
        message, delta = choice["message"], part["delta"]
        for name in ("content", "reasoning_content", "reasoning"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for piece in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if piece["index"] == len(calls):
                assert piece["id"].startswith("call_")
                assert piece["type"] == "function"
                calls.append({"name": piece["function"]["name"], "arguments": ""})
            else:
                assert set(piece) == {"index", "function"}
            assert piece["index"] == len(calls) - 1
            calls[-1]["arguments"] += piece["function"]["arguments"]
        choice["finish_reason"] = part["finish_reason"]
        choice["logprobs"] += (part["logprobs"] or {}).get("content", [])
        choice["token_ids"] += part.get("token_ids", [])
    return choices


def shape_of(choice: dict[str, Json]) -> dict[str, Json]:
    """A whole choice in the same shape."""
    message = {
        name: choice["message"][name]
        for name in ("content", "reasoning_content", "reasoning")
        if choice["message"].get(name)
    }
    if calls := choice["message"].get("tool_calls"):
        message["tool_calls"] = [one["function"] for one in calls]
    return {
        "message": message,
        "logprobs": (choice["logprobs"] or {}).get("content", []),
        "token_ids": choice.get("token_ids", []),
        "finish_reason": choice["finish_reason"],
    }


async def test_a_call() -> None:
    async with talking(f"Let me see.\n{call()}\n{call('世', 'get_time')}") as served:
        body = await answer(served, **ASKING)
    ChatCompletion.model_validate(body, strict=True)
    (choice,) = body["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    assert [one["type"] for one in message["tool_calls"]] == ["function"] * 2
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["get_weather", "get_time"]
    assert [json.loads(one["function"]["arguments"])["city"] for one in message["tool_calls"]] == [
        "Oslo",
        "世",
    ]
    ids = [one["id"] for one in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert "reasoning_tokens" not in body["usage"]["completion_tokens_details"]


async def test_an_answer_of_calls_alone_has_no_content() -> None:
    async with talking(call()) as served:
        body = await answer(served, **ASKING)
    assert body["choices"][0]["message"]["content"] is None
    ChatCompletion.model_validate(body, strict=True)


TEXTS = [
    call(),
    f"Yes.\n\n{call()}\n{call('a')} Done.\n",
    "No call, <tool_call, at all.",
    f"<tool_call>no</tool_call>{call()}",
    f"<think>\nHm, <tool_call>.\n</think>\n\n{call()}",
    "<think>never ends",
    "hm</think> 世 with tags <think>",
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
@pytest.mark.parametrize("tokens_per_event", [1, 7])
@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder"])
async def test_joined_stream_is_the_whole_answer(text: str, tokens_per_event: int, parser: str) -> None:
    fields = ASKING | {"n": 2, "logprobs": True, "return_token_ids": True, "seed": 1}
    says = [text, f"{text}!"]
    options: dict[str, Json] = {
        "tokens_per_event": tokens_per_event,
        "tool_call_parser": parser,
        "reasoning_parser": "think",
    }
    async with talking(lambda i: says[i], **options) as served:
        whole = await answer(served, **fields)
        parts = await chunks(served, stream_options={"include_usage": True}, **fields)
    for part in parts:
        ChatCompletionChunk.model_validate(part, strict=True)
    choices = joined_messages(parts)
    assert {choice["index"]: shape_of(choice) for choice in whole["choices"]} == choices
    assert [len(choice["token_ids"]) for choice in choices.values()] == [len(ids_of(say)) + 1 for say in says]
    assert parts[-1]["usage"] == whole["usage"]


async def test_at_most_one_call_ends_the_answer() -> None:
    for tokens_per_event in (1, 50):
        text = f"Now {call()}\n{call('b')} more"
        async with talking(text, tokens_per_event=tokens_per_event) as served:
            body = await answer(served, parallel_tool_calls=False, **ASKING)
            (choice,) = body["choices"]
            assert choice["message"]["content"] == "Now"
            (one,) = choice["message"]["tool_calls"]
            assert json.loads(one["function"]["arguments"]) == {"city": "Oslo"}
            assert choice["finish_reason"] == "tool_calls"
            assert body["usage"]["completion_tokens"] == len(ids_of(f"Now {call()}"))
            await until(partial(bool, served.engine.aborted))
            body = await answer(served, **ASKING)
            assert len(body["choices"][0]["message"]["tool_calls"]) == 2


async def test_an_answer_that_is_cut_off_is_text_and_says_so() -> None:
    async with talking(call()) as served:
        (choice,) = (await answer(served, **ASKING | {"max_tokens": 30}))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == call()[:30]
    assert "tool_calls" not in choice["message"]


async def test_a_call_that_a_grammar_guides_is_streamed_while_it_grows() -> None:
    async with talking(call("a long name")) as served:
        parts = await chunks(served, tool_choice="required", **ASKING)
        cut = await answer(served, tool_choice="required", **ASKING | {"max_tokens": 60})
    arguments = [
        piece["function"]["arguments"]
        for part in parts
        for choice in part["choices"]
        for piece in choice["delta"].get("tool_calls", [])
    ]
    assert len(arguments) > 10
    assert json.loads("".join(arguments)) == {"city": "a long name"}
    (choice,) = cut["choices"]
    assert choice["finish_reason"] == "length"
    assert '{"city": "a long name"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("stop", ["Oslo", "</tool_call>"])
async def test_stop_strings_end_calls_too(stop: str) -> None:
    async with talking(call()) as served:
        (choice,) = (await answer(served, stop=stop, **ASKING))["choices"]
    text = call().partition(stop)[0]
    if stop == "Oslo":
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    else:  # what a model leaves out at its end may be left out
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


# ---- grammars ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "names", "most"),
    [
        ("required", ["get_weather", "get_time"], None),
        ({"type": "function", "function": {"name": "get_time"}}, ["get_time"], 1),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "get_weather"}}]},
            },
            ["get_weather"],
            None,
        ),
    ],
    ids=["required", "named", "allowed"],
)
async def test_a_choice_is_made_of_a_grammar(choice: Json, names: list[str], most: int | None) -> None:
    async with talking(call()) as served:
        await answer(served, tool_choice=choice, **ASKING)
        (request,) = served.engine.requests
        assert "get_weather" in prompt_of(served), "the model is told of all tools"
    assert request.grammar is not None
    check_grammar(request.grammar)
    assert [name for name in ("get_weather", "get_time") if name in request.grammar.text] == names
    assert ("call){0," in request.grammar.text) == (most is None)


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": None}], ids=str)
async def test_without_need_no_grammar_guides(fields: dict[str, Json]) -> None:
    async with talking(call()) as served:
        await answer(served, **ASKING, **fields)
        assert served.engine.requests[0].grammar is None


async def test_strict_tools_are_guided() -> None:
    async with talking(call()) as served:
        await answer(served, **ASKING | {"tools": [tool(strict=True)]})
        (request,) = served.engine.requests
    assert request.grammar is not None
    assert "OTHER" in request.grammar.text


async def test_none_is_told_of_no_tools() -> None:
    async with talking(call()) as served:
        body = await answer(served, **ASKING, tool_choice="none")
        assert "get_weather" not in prompt_of(served)
    assert body["choices"][0]["message"]["content"] == call()


async def test_a_format_goes_with_tools_and_thoughts() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
    async with talking("12", reasoning_parser="think") as served:
        await answer(served, **ASKING, response_format=form)
        await answer(served, messages=USER, response_format=form)
        await answer(served, messages=USER, response_format=form, chat_template_kwargs={"think": True})
        beside, behind, inside = [request.grammar for request in served.engine.requests]
        error = error_of(await chat(served, **ASKING, structured_outputs={"grammar": 'start: "a"'}), 400)
    for grammar, text in ((beside, "answer | calls"), (behind, "start: ("), (inside, "start: thoughts")):
        assert grammar is not None
        check_grammar(grammar)
        assert text in grammar.text
    assert error["param"] == "structured_outputs"


# ---- what the model is told ----------------------------------------------------------------------


def asked(arguments: Json, **fields: Json) -> dict[str, Json]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    } | fields


RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}], ids=repr)
async def test_calls_and_results_reach_the_template(arguments: Json) -> None:
    async with talking("ok") as served:
        await answer(served, messages=[*USER, asked(arguments, content=None), RESULT], tools=TOOLS)
        prompt = prompt_of(served)
    assert prompt.startswith(f"T{json.dumps(TOOLS_SEEN, ensure_ascii=False)}<tool_call>;user:Weather?;")
    assert prompt.endswith('assistant:<tool_call>get_weather{"city": "Oslo"}</tool_call>;tool:rain;a:')


TOOLS_SEEN = [
    {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": PARAMETERS}},
    {
        "type": "function",
        "function": {"name": "get_time", "description": "The <time>.", "parameters": PARAMETERS},
    },
]


async def test_a_template_that_joins_texts_gets_arguments_as_text() -> None:
    source = (
        "{{ tools }}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c['function']['arguments'] }}{% endfor %}{% endfor %}"
    )
    async with talking("ok", source, tool_call_parser="hermes") as served:
        await answer(served, messages=[*USER, asked('{"city":"世"}'), RESULT])
        assert prompt_of(served) == 'NoneWeather?get_weather{"city": "世"}rain'


async def test_an_answer_with_calls_can_be_sent_back_as_it_came() -> None:
    async with talking(f"<think>hm</think>{call()}", reasoning_parser="think") as served:
        message = (await answer(served, **ASKING))["choices"][0]["message"]
        assert message["reasoning_content"] == message["reasoning"] == "hm"
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
        await answer(served, **ASKING | {"messages": [*USER, message, result]})
        assert '<tool_call>get_weather{"city": "Oslo"}</tool_call>;tool:rain' in prompt_of(served)


async def test_generic_words_for_templates_without_tools() -> None:
    history = [{"role": "system", "content": "Be."}, *USER, asked('{"city": "Oslo"}', content="Hm."), RESULT]
    history += [{**RESULT, "content": [{"type": "text", "text": "wind"}]}, *USER]
    async with talking(call(), BARE, describes_tools=True) as served:
        body = await answer(served, messages=history, tools=TOOLS)
        prompt = prompt_of(served)
        await answer(served, messages=USER, tools=TOOLS)
        alone = prompt_of(served)
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert prompt.startswith("system:Be.\n\nYou can call")
    assert json.dumps(TOOLS_SEEN[1]["function"]) in prompt
    assert f"assistant:Hm.\n{call()};user:<tool_response>\nrain\n</tool_response>\n" in prompt
    assert prompt.endswith("<tool_response>\nwind\n</tool_response>;user:Weather?;a:")
    assert alone.startswith("system:You can call")


async def test_control_tokens_in_tools_and_calls_are_text() -> None:
    evil = "<eos>"
    parameters = {"type": "object", "properties": {evil: {"enum": [evil]}}}
    history = [*USER, asked({evil: evil}), {**RESULT, "content": evil}]
    for describes in (False, True):
        async with talking("ok", BARE if describes else TEMPLATE, describes_tools=describes) as served:
            await answer(served, messages=history, tools=[tool(description=evil, parameters=parameters)])
            ids = served.engine.requests[0].prompt_token_ids
        assert 256 not in ids
        assert bytes(ids).decode().count(evil) == 6


# ---- refusals ------------------------------------------------------------------------------------


def schema(**fields: Json) -> dict[str, Json]:
    return {"tools": [tool(parameters=fields)], "tool_choice": "required"}


REFUSED: list[tuple[dict[str, Json], str, str]] = [
    ({"tools": [tool()] * 2}, "tools", "2 are called 'get_weather'"),
    ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "at most 128 entries, not 129"),
    ({"tools": [tool("a b")]}, "tools", "tools.0.function.name must match"),
    ({"tools": [tool("a" * 129)]}, "tools", "tools.0.function.name must match"),
    ({"tools": [{"type": "web_search"}]}, "tools", "tools.0.type is 'web_search', which is not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "tools.0.function is required"),
    ({"tools": [tool(colour="red")]}, "colour", "unknown field 'colour' in tools.0.function"),
    ({"tools": [tool(parameters=[])]}, "tools", "tools.0.function.parameters must be an object"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools", "must be of the type 'object', not 'array'"),
    ({"tools": [tool(parameters={"properties": []})]}, "tools", "properties that are not an object"),
    ({"tools": [tool(parameters={"required": [1]})]}, "tools", "required that are not a list of strings"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
    (
        {"tools": None, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "no tools",
    ),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "'f', which is none of",
    ),
    ({"tool_choice": "any"}, "tool_choice", "must be"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "goes with the field function alone"),
    ({"tool_choice": {"type": "custom"}}, "tool_choice", "must be 'function' or 'allowed_tools'"),
    (schema(properties={"a": {"type": "cat"}}), "tools", "tools.0.function.parameters (of 'get_weather')"),
    (schema(properties={"a": {"uniqueItems": True}}), "tools", "not supported: uniqueItems"),
    (
        schema(properties={f"p{i}": {"enum": ["x" * 1000]} for i in range(200)}),
        "tools",
        "the text of tools has",
    ),
    (
        {"messages": [*USER, {**USER[0], "tool_calls": [asked("")["tool_calls"][0]]}]},
        "messages",
        "only an assistant's",
    ),
    ({"messages": [*USER, asked("[1]")]}, "messages", "messages.1.tool_calls.0.function.arguments must be"),
    ({"messages": [*USER, asked("{")]}, "messages", "not '{'"),
    ({"messages": [*USER, asked('{"a": "\\ud800"}')]}, "messages", "the text of a JSON object"),
    ({"messages": [*USER, asked('{"a": ' * 5000)]}, "messages", "the text of a JSON object"),
    (
        {"messages": [*USER, {"role": "function", "name": "f", "content": "a"}]},
        "messages",
        "have the role 'tool'",
    ),
    ({"messages": [*USER, {"role": "tool"}]}, "messages", "messages.1 has no content"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_is_refused_is_said(fields: dict[str, Json], param: str, words: str) -> None:
    async with talking(call()) as served:
        error = error_of(await chat(served, **ASKING | fields), 400)
        assert error["param"] == param
        assert words in error["message"]
        assert served.engine.requests == []
        await answer(served, **ASKING)


@pytest.mark.parametrize("index", [0, 7, 8, 100, 127])
async def test_the_tool_at_fault_is_named_wherever_it_stands(index: int) -> None:
    tools = [tool(f"f{i}") for i in range(128)]
    tools[index] = tool(f"f{index}", parameters={"properties": {"a": {"type": "cat"}}})
    named = {"type": "function", "function": {"name": f"f{index}"}}
    asking = {"messages": USER, "tools": tools, "max_tokens": 9}
    async with talking(call(), info=msgspec.structs.replace(INFO, max_model_len=20000)) as served:
        for choice in ("required", named):
            error = error_of(await chat(served, **asking, tool_choice=choice), 400)
            assert error["param"] == "tools"
            assert f"tools.{index}.function.parameters (of 'f{index}')" in error["message"]


async def test_large_schemas_are_refused_where_a_grammar_is_made_of_them() -> None:
    fields = schema(properties={f"p{i}": {"enum": ["x" * 1000]} for i in range(200)})
    async with talking(call(), info=msgspec.structs.replace(INFO, max_model_len=2**20)) as served:
        error = error_of(await chat(served, **ASKING | fields), 400)
        await answer(served, **ASKING | fields | {"tool_choice": "auto"})
    assert error["param"] == "tools"
    assert "at most 131072 are allowed" in error["message"]


async def test_deep_schemas_are_refused() -> None:
    async with talking(call()) as served:
        for depth in (150, 5000):
            deep = '{"items": ' * depth + "{}" + "}" * depth
            whole = json.dumps({"model": "default", **ASKING, "tool_choice": "required"})
            body = whole.replace(json.dumps(PARAMETERS), f'{{"properties": {{"a": {deep}}}}}')
            headers = {"content-type": "application/json"}
            response = await served.client.post("/v1/chat/completions", content=body, headers=headers)
            error_of(response, 400)
        await answer(served, **ASKING)


async def test_a_model_without_tools_says_how_to_serve_them() -> None:
    async with talking(call(), BARE) as served:
        error = error_of(await chat(served, **ASKING), 400)
        assert (error["param"], "--tool-template generic" in error["message"]) == ("tools", True)
    async with talking(call(), BARE, tool_call_parser="hermes") as served:
        error = error_of(await chat(served, **ASKING), 400)
        assert "the model's chat template has no tools" in error["message"]
        error = error_of(await chat(served, messages=[*USER, asked("{}"), RESULT]), 400)
        assert "messages.1.tool_calls: the model's chat template leaves calls out" in error["message"]
        await answer(served, messages=USER, tools=TOOLS, tool_choice="none")
    async with talking(call(), tool_call_parser="none") as served:
        assert "does not know how" in error_of(await chat(served, **ASKING), 400)["message"]


def test_options_that_contradict_each_other_are_refused() -> None:
    template = ChatTemplate(BARE, describes_tools=True)
    with pytest.raises(SettingsError, match="--tool-call-parser qwen3_coder does not read"):
        create_app(FakeEngine(lambda _: []), byte_codec(), Settings(tool_call_parser="qwen3_coder"), template)


async def test_a_template_that_leaves_tools_out_is_noticed() -> None:
    source = "{% if tools and think %}{{ tools | tojson }}<tool_call>{% endif %}{{ messages[0].content }}"
    async with talking(call(), source) as served:
        error = error_of(await chat(served, **ASKING), 400)
        assert "the chat template leaves the tool 'get_weather' out" in error["message"]


async def test_an_engine_without_grammars_says_so() -> None:
    info = msgspec.structs.replace(INFO, max_model_len=4000, grammar_problem="no grammars here")
    async with talking(call(), info=info) as served:
        error = error_of(await chat(served, **ASKING, tool_choice="required"), 400)
        assert (error["param"], error["message"]) == ("tools", "tools: no grammars here")
        await answer(served, **ASKING)


# ---- thoughts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields", "message", "num_tokens"),
    [
        ("<think>\nhm\n</think>\n\nyes", {}, {"content": "yes", "reasoning": "hm"}, 19),
        (
            "hm</think>yes",
            {"chat_template_kwargs": {"think": True}},
            {"content": "yes", "reasoning": "hm"},
            10,
        ),
        (
            "<think>hm</think>yes",
            {"chat_template_kwargs": {"think": True}},
            {"content": "yes", "reasoning": "hm"},
            17,
        ),
        ("hm</think>yes", {}, {"content": "hm</think>yes"}, 0),
        ("<think>\n\n</think>\n\nyes", {}, {"content": "yes"}, 17),
        ("hm", {"chat_template_kwargs": {"think": True}}, {"content": "", "reasoning": "hm"}, 3),
        (
            "hm</think>yes",
            {
                "messages": [*USER, {"role": "assistant", "content": "<think>Oh,"}],
                "continue_final_message": True,
            },
            {"content": "yes", "reasoning": "hm"},
            10,
        ),
    ],
    ids=str,
)
async def test_thoughts_are_told_apart(
    text: str, fields: dict[str, Json], message: dict[str, Json], num_tokens: int
) -> None:
    async with talking(text, f"{{# </think> #}}{TEMPLATE}") as served:
        body = await answer(served, **{"messages": USER, "max_tokens": 500} | fields)
        parts = await chunks(served, **{"messages": USER, "max_tokens": 500} | fields)
    (choice,) = body["choices"]
    expected = {"role": "assistant", "refusal": None, **message}
    if "reasoning" in message:
        expected["reasoning_content"] = message["reasoning"]
    assert choice["message"] == expected
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == num_tokens
    assert joined_messages(parts) == {0: shape_of(choice)}


@pytest.mark.parametrize(("option", "is_split"), [("auto", False), ("none", False), ("think", True)])
async def test_the_option_decides(option: str, is_split: bool) -> None:
    async with talking("<think>hm</think>yes", TEMPLATE, reasoning_parser=option) as served:
        message = (await answer(served, messages=USER))["choices"][0]["message"]
    assert ("reasoning" in message) == is_split


async def test_tags_that_are_special_tokens_are_seen() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([*TAGS, "<other>"])
    ids = [257, *ids_of("hm"), 258, 261, 259, *ids_of('{"name": "get_time"}'), 260, 256]
    info = msgspec.structs.replace(INFO, max_model_len=4000, vocab_size=262)
    engine = FakeEngine(lambda _: ids, info=info)
    template = ChatTemplate(TEMPLATE)
    async with serving(engine, chat_template=template, codec=TextCodec(tokenizer)) as served:
        (choice,) = (await answer(served, **ASKING))["choices"]
        await answer(served, **ASKING, tool_choice="required")
        (plain,) = (await answer(served, messages=USER))["choices"]
        grammar = served.engine.requests[1].grammar
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == ("hm", None)
    assert message["tool_calls"][0]["function"]["name"] == "get_time"
    assert plain["message"]["content"] == '{"name": "get_time"}', "no tools, no tags"
    assert grammar is not None
    assert grammar.special_tokens == tuple(sorted(TAGS))
    check_grammar(grammar)


# ---- the last message continued -------------------------------------------------------------------


async def test_the_last_message_is_continued() -> None:
    for content in ("Once upon ", [{"type": "text", "text": "Once upon "}], ""):
        async with talking("a time") as served:
            messages = [*USER, {"role": "assistant", "content": content}]
            body = await answer(served, messages=messages, continue_final_message=True)
            said = "Once upon " if content else ""
            assert prompt_of(served) == f"user:Weather?;assistant:{said}"
            assert body["choices"][0]["message"]["content"] == "a time"
            response = await served.post(
                "/tokenize", prompt=..., max_tokens=..., messages=messages, continue_final_message=True
            )
            assert response.json()["tokens"] == served.engine.requests[0].prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"add_generation_prompt": True}, "can't both be true"),
        ({"messages": [*USER, asked("{}")]}, "has tool_calls, which can't be continued"),
    ],
    ids=str,
)
async def test_what_cannot_be_continued_is_said(fields: dict[str, Json], words: str) -> None:
    async with talking("ok") as served:
        error = error_of(
            await chat(served, **{"messages": USER, "continue_final_message": True} | fields), 400
        )
        assert error["param"] == "continue_final_message"
        assert words in error["message"]
        await answer(served, messages=USER, continue_final_message=True, add_generation_prompt=False)
