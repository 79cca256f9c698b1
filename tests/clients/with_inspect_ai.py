"""inspect-ai: its providers for completions and for chat, alone and in an evaluation."""

import os

from inspect_ai import Task, eval_async
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig, Model, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate
from inspect_ai.tool import Tool, ToolFunction, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

from tests.clients.checks import MODEL, USER, Server
from tests.loose import Json

PROMPT = USER[0]["content"]


class Place(BaseModel):
    """A structured answer."""

    x: int
    is_far: bool


def model_of(server: Server, provider: str = "openai-api", **config: Json) -> Model:
    """The model by one of the two providers."""
    os.environ |= {"INSPECT_DISPLAY": "none", "SPEED_BASE_URL": server.openai_url, "SPEED_API_KEY": "none"}
    settings = GenerateConfig(**{"temperature": 0.0, "max_tokens": 24} | config)
    return get_model(f"{provider}/speed/{MODEL}", config=settings, memoize=False)


@tool
def get_weather() -> Tool:
    """A tool for the model."""

    async def execute(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        return f"rain in {city}"

    return execute


async def check_prompt_logprobs(server: Server) -> None:
    """`openai-api-completions` with prompt_logprobs: the server's own, for texts and token ids"""
    ids = server.post("/tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"]
    direct = server.post("/v1/completions", prompt=ids, max_tokens=1, prompt_logprobs=2)
    scores = direct["choices"][0]["prompt_logprobs"]
    expected = [score[str(token)]["logprob"] for score, token in zip(scores[1:], ids[1:], strict=True)]
    model = model_of(server, "openai-api-completions", prompt_logprobs=2, max_tokens=1)
    for message in (
        ChatMessageUser(content=PROMPT),
        ChatMessageUser(content=PROMPT, metadata={"prompt_token_ids": ids}),
    ):
        output = await model.generate([message])
        given = output.choices[0].prompt_logprobs
        assert given is not None
        assert [score.logprob for score in given.content[-len(expected) :]] == expected


async def check_completions(server: Server) -> None:
    """`openai-api-completions`: several choices with log-probabilities"""
    model = model_of(server, "openai-api-completions", logprobs=True, top_logprobs=2, num_choices=2, seed=3)
    output = await model.generate(PROMPT)
    assert len(output.choices) == 2
    assert all(len(choice.logprobs.content) == 24 for choice in output.choices if choice.logprobs)


async def check_chat(server: Server) -> None:
    """Chat, with log-probabilities"""
    output = await model_of(server, logprobs=True, top_logprobs=2).generate(PROMPT)
    assert output.completion == server.chat()
    assert output.choices[0].logprobs is not None
    assert len(output.choices[0].logprobs.content) == 24


async def check_tools(server: Server) -> None:
    """A tool that must be called"""
    model = model_of(server, max_tokens=400, temperature=1.0, seed=3)
    output = await model.generate(PROMPT, tools=[get_weather()], tool_choice=ToolFunction("get_weather"))
    assert output.message.tool_calls
    assert all(call.function == "get_weather" and not call.parse_error for call in output.message.tool_calls)


async def check_schemas(server: Server) -> None:
    """Structured output by json_schema"""
    schema = ResponseSchema(name="place", json_schema=json_schema(Place))
    output = await model_of(server, response_schema=schema, max_tokens=200).generate(PROMPT)
    Place.model_validate_json(output.completion)


async def check_evaluations(server: Server) -> None:
    """An evaluation of three samples"""
    task = Task(
        dataset=[Sample(input=f"{PROMPT} {i}", target="x") for i in range(3)],
        solver=generate(),
        scorer=includes(),
    )
    (log,) = await eval_async(task, model=model_of(server), log_dir=str(server.folder / "logs"))
    assert log.status == "success", log.error
    assert len(log.samples or []) == 3
