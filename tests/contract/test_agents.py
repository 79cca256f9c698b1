"""Bodies as agents and chat programs send them, in the shapes of their public sources: each gets an answer.

Codex speaks /v1/responses alone and Claude Code /v1/messages alone; Cline speaks the latter or chat; Continue
and Open WebUI speak chat, and Continue completions for what it writes ahead of a cursor.
"""

import json

import pytest

from tests.contract.conftest import Served
from tests.contract.test_errors import error_of
from tests.contract.test_messages import events_of as message_events
from tests.contract.test_messages import retold, told_by
from tests.contract.test_responses import events_of as response_events
from tests.contract.test_responses import saying
from tests.contract.test_tools import TEMPLATE, prompt_of
from tests.loose import Json

# ---- Codex ----------------------------------------------------------------------------------------


def shell(text: str) -> str:
    """A call of Codex' tool as a model writes it."""
    called = {"name": "shell", "arguments": {"command": ["echo", text]}}
    return f"<tool_call>\n{json.dumps(called)}\n</tool_call>"


SHELL = {
    "type": "function",
    "name": "shell",
    "description": "Runs a shell command and returns its output.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "The command"},
            "workdir": {"type": "string"},
            "timeout_ms": {"type": "number"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
CODEX_TOOLS = [
    SHELL,
    {"type": "local_shell"},
    {"type": "web_search", "external_web_access": True},
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
    },
    {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [SHELL]},
]


def said(role: str, text: str) -> dict[str, Json]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def codex(*history: Json, **fields: Json) -> dict[str, Json]:
    return {
        "model": "default",
        "instructions": "You are a coding agent.",
        "input": [
            said("developer", "<permissions>read-only</permissions>"),
            said("user", "<environment_context><cwd>/x</cwd></environment_context>"),
            said("user", "Say hi by the shell."),
            *history,
        ],
        "tools": CODEX_TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-aa",
        "text": {"verbosity": "low"},
        "client_metadata": {"x-codex-installation-id": "0199-bb"},
        **fields,
    }


async def post(served: Served, path: str, body: dict[str, Json]) -> Json:
    return await served.client.post(path, json=body)


async def test_codex_asks_runs_and_asks_again() -> None:
    """Its history is made of the items that it got with `response.output_item.done`."""
    text = f"<think>Hm.</think>\n\nI run it.\n{shell('hi')}"
    async with saying(text, reasoning_parser="think") as served:
        response = await post(served, "/v1/responses", codex())
        events = response_events(response)
        assert "'local_shell', 'web_search', 'custom', 'namespace'" in response.headers["x-speed-warning"]
        assert "system:You are a coding agent.\n<permissions>" in prompt_of(served)
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
        assert json.loads(items[2]["arguments"]) == {"command": ["echo", "hi"]}
        assert events[-1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] >= 0
        thoughts: dict[str, Json] = {
            "type": "reasoning",
            "summary": [],
            "content": None,
            "encrypted_content": None,
        }
        output = {"type": "function_call_output", "call_id": items[2]["call_id"], "output": "hi\n"}
        again = codex(thoughts, items[1] | {"phase": "commentary"}, items[2], output)
        assert response_events(await post(served, "/v1/responses", again))[-1]["type"] == "response.completed"
        assert prompt_of(served).endswith(
            'assistant:I run it.<tool_call>shell{"command": ["echo", "hi"]}</tool_call>;tool:hi\n;a:'
        )


async def test_codex_probes_and_asks_for_a_schema() -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False, "required": []}
    asked = {
        "format": {"type": "json_schema", "strict": True, "schema": schema, "name": "codex_output_schema"}
    }
    async with saying("{}") as served:
        probe = {"model": "default", "input": "", "max_output_tokens": 1}
        assert (await post(served, "/v1/responses", probe)).status_code == 200
        response = await post(served, "/v1/responses", codex(text=asked, tools=[], reasoning=None))
        assert response_events(response)[-1]["type"] == "response.completed"
        assert served.engine.requests[-1].grammar is not None


async def test_codex_is_told_what_it_cannot_have() -> None:
    async with saying("x") as served:
        chained = await post(served, "/v1/responses", codex(previous_response_id="resp_1"))
        assert error_of(chained, 400)["param"] == "previous_response_id"
        patch = {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"}
        error = error_of(await post(served, "/v1/responses", codex(patch)), 400)
        assert error["message"].startswith("input.3 has the type 'custom_tool_call'")
        picture = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_image", "image_url": "data:,"}],
        }
        error = error_of(await post(served, "/v1/responses", codex(picture)), 400)
        assert error["message"].startswith("input.3.content.0 has the type 'input_image'")


# ---- Claude Code ----------------------------------------------------------------------------------

READ = {
    "name": "Read",
    "description": "Reads a file.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "file_path": {"type": "string"},
            "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        },
        "required": ["file_path"],
        "additionalProperties": False,
    },
    "eager_input_streaming": True,
}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
CLAUDE_HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "x-app": "cli",
    "authorization": "Bearer none",
    "anthropic-dangerous-direct-browser-access": "true",
}


def claude_code(*history: Json, **fields: Json) -> dict[str, Json]:
    return {
        "model": "default",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be careful.</system-reminder>"},
                    {"type": "text", "text": "What is in a.txt?", **CACHED},
                ],
            },
            *history,
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1"},
            {"type": "text", "text": "You are Claude Code.", **CACHED},
        ],
        "tools": [READ, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "stream": True,
        **fields,
    }


async def ask_claude(served: Served, body: dict[str, Json], path: str = "/v1/messages") -> Json:
    return await served.client.post(f"{path}?beta=true", json=body, headers=CLAUDE_HEADERS)


async def test_claude_code_asks_runs_and_asks_again() -> None:
    used = json.dumps({"name": "Read", "arguments": {"file_path": "/a.txt"}})
    text = f"<think>Hm.</think>\n\nI read it.\n<tool_call>{used}</tool_call>"
    async with saying(text, reasoning_parser="think") as served:
        response = await ask_claude(served, claude_code())
        message = retold(message_events(response))
        assert "web_search_20250305" in response.headers["x-speed-warning"]
        assert message["stop_reason"] == "tool_use"
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
        assert message["content"][2]["input"] == {"file_path": "/a.txt"}
        result = {
            "tool_use_id": message["content"][2]["id"],
            "type": "tool_result",
            "content": "1\thello",
            **CACHED,
        }
        again = [
            {"role": "assistant", "content": message["content"]},
            {
                "role": "user",
                "content": [result, {"type": "text", "text": "<system-reminder>x</system-reminder>"}],
            },
        ]
        assert message_events(await ask_claude(served, claude_code(*again)))[-1]["type"] == "message_stop"
        assert prompt_of(served).endswith(
            'assistant:I read it.<tool_call>Read{"file_path": "/a.txt"}</tool_call>;tool:1\thello;'
            "user:<system-reminder>x</system-reminder>;a:"
        )


async def test_claude_codes_small_requests() -> None:
    """A question after its quota, a title as JSON, tokens to be counted."""
    title = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    wanted = {"type": "json_schema", "schema": title | {"additionalProperties": False}}
    async with saying('{"title": "x"}') as served:
        quota = {"model": "default", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
        answer = (await ask_claude(served, quota)).json()
        assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", 1)
        asked = claude_code(tools=[], thinking={"type": "disabled"}, output_config={"format": wanted})
        assert (
            retold(message_events(await ask_claude(served, asked)))["content"][0]["text"] == '{"title": "x"}'
        )
        counted = {name: claude_code()[name] for name in ("model", "messages", "tools", "system")}
        answer = await ask_claude(served, counted, "/v1/messages/count_tokens")
        assert answer.json()["input_tokens"] > 100


async def test_claude_code_is_told_what_it_cannot_have() -> None:
    async with saying("x") as served:
        edits = {"edits": [{"type": "clear_tool_uses_20250919"}]}
        for fields, words in (
            ({"model": "claude-opus-4"}, "the model 'claude-opus-4' does not exist"),
            (
                {"context_management": edits},
                "context_management.edits.0.type must be 'clear_thinking_20251015'",
            ),
        ):
            status, kind = (404, "not_found_error") if "model" in fields else (400, "invalid_request_error")
            assert words in told_by(await ask_claude(served, claude_code(**fields)), status, kind)
        long = {"role": "user", "content": "x" * 9000}
        words = told_by(await ask_claude(served, claude_code(long)), 400, "invalid_request_error")
        assert words.startswith("prompt is too long: ")


# ---- Cline, Continue, Open WebUI ------------------------------------------------------------------

FUNCTION: dict[str, Json] = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
CHATS: dict[str, dict[str, Json]] = {
    "Cline": {
        "messages": [
            {"role": "system", "content": "You are Cline."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "<task>hi</task>"}, {"type": "text", "text": "x"}],
            },
        ],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [FUNCTION | {"function": FUNCTION["function"] | {"strict": False}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
    },
    "Continue": {
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}],
        "max_tokens": 2048,
        "temperature": 0.5,
        "stream": True,
        "stop": ["\n\n\n"],
        "tools": [FUNCTION],
        "parallel_tool_calls": False,
        "stream_options": {"include_usage": True},
    },
    "Open WebUI": {
        "stream": True,
        "messages": [{"role": "user", "content": "hi"}],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_k": 40,
        "min_p": 0.0,
        "seed": 0,
        "frequency_penalty": 1,
        "logit_bias": {"5": 1},
    },
    "Open WebUI, a title": {
        "messages": [{"role": "user", "content": "### Task:\nGenerate a title"}],
        "stream": False,
        "max_completion_tokens": 1000,
    },
}


@pytest.mark.parametrize("name", CHATS)
async def test_chats(name: str) -> None:
    async with saying("Well.") as served:
        response = await post(served, "/v1/chat/completions", {"model": "default", **CHATS[name]})
        assert response.status_code == 200, response.text
        if CHATS[name]["stream"]:
            *_, last = served.frames(response)
            assert last["usage"]["completion_tokens"] > 0
        else:
            assert response.json()["choices"][0]["message"]["content"] == "Well."


async def test_cline_speaks_to_messages_as_well() -> None:
    body = {
        "model": "default",
        "max_tokens": 8192,
        "temperature": 0,
        "system": [{"text": "You are Cline.", "type": "text", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        "thinking": {"type": "enabled", "budget_tokens": 4096},
        "tools": [{"name": "read_file", "description": "x", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
        "stream": True,
    }
    used = '<tool_call>{"name": "read_file", "arguments": {}}</tool_call>'
    async with saying(used) as served:
        assert retold(message_events(await ask_claude(served, body)))["stop_reason"] == "tool_use"


async def test_continue_writes_ahead_of_a_cursor() -> None:
    """Models without tokens for filling in the middle get the prompt of a template, not a suffix."""
    body = {
        "model": "default",
        "prompt": "<PRE> def f( <SUF>): <MID>",
        "max_tokens": 256,
        "temperature": 0.01,
        "stop": ["<PRE>", "<SUF>", "<MID>", "/src/"],
        "stream": True,
    }
    async with saying("x):") as served:
        chunks = served.frames(await post(served, "/v1/completions", body))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "x):"
        error = error_of(await post(served, "/v1/completions", body | {"suffix": "):"}), 400)
        assert error["param"] == "suffix"


async def test_open_webuis_own_fields_are_refused_by_name() -> None:
    """Its backend takes them out; a client that talks to the server past it learns what is wrong."""
    async with saying("x", TEMPLATE) as served:
        for name, value in (("chat_id", "c"), ("features", {}), ("background_tasks", {})):
            body = {"model": "default", **CHATS["Open WebUI"], name: value}
            error = error_of(await post(served, "/v1/chat/completions", body), 400)
            assert (error["code"], error["param"]) == ("unknown_field", name)
