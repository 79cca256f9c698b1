"""pydantic-ai: agents with tools and typed outputs over chat, responses and messages."""

from importlib import metadata
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput, UsageLimits
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from tests.clients.checks import MODEL, USER, Server

PROMPT = USER[0]["content"]


class Forecast(BaseModel):
    """What a model of noise can fill in within a few tokens."""

    city: Literal["Oslo", "Bergen"]
    days: Annotated[int, Field(ge=1, le=9)]


def settings() -> ModelSettings:
    """Noise, but the same at every time."""
    return ModelSettings(temperature=1.0, seed=3, max_tokens=400)


def models(server: Server) -> list[Model]:
    """One for each API."""
    provider = OpenAIProvider(base_url=server.openai_url, api_key="none")
    found: list[Model] = [
        OpenAIChatModel(MODEL, provider=provider),
        OpenAIResponsesModel(MODEL, provider=provider),
    ]
    # Later versions of `anthropic` refuse the HTTP client that pydantic-ai hands them.
    if metadata.version("anthropic").startswith("0."):
        found.append(AnthropicModel(MODEL, provider=AnthropicProvider(base_url=server.url, api_key="none")))
    return found


def check_texts(server: Server) -> None:
    """Texts over chat, responses and messages"""
    greedy = ModelSettings(temperature=0, max_tokens=24)
    for model in models(server):
        assert Agent(model, model_settings=greedy).run_sync(PROMPT).output == server.chat()


async def check_streamed_texts(server: Server) -> None:
    """The same streamed"""
    greedy = ModelSettings(temperature=0, max_tokens=24)
    for model in models(server):
        async with Agent(model, model_settings=greedy).run_stream(PROMPT) as running:
            parts = [part async for part in running.stream_text(delta=True, debounce_by=None)]
        assert "".join(parts) == server.chat()


def check_outputs_by_tools(server: Server) -> None:
    """Typed outputs by a tool that must be called"""
    for model in models(server):
        agent = Agent(model, output_type=ToolOutput(Forecast), model_settings=settings(), retries=0)
        assert isinstance(agent.run_sync(PROMPT).output, Forecast)


def check_outputs_by_schemas(server: Server) -> None:
    """Typed outputs by json_schema"""
    for model in models(server)[:2]:
        agent = Agent(model, output_type=NativeOutput(Forecast), model_settings=settings(), retries=0)
        assert isinstance(agent.run_sync(PROMPT).output, Forecast)


def agent_with_tool(model: Model, called: list[str]) -> Agent[None, Forecast]:
    """An agent that must call its tool, which notes it in `called`, before it may end."""

    async def outputs(context: RunContext[None], tools: list[ToolDefinition]) -> list[ToolDefinition]:
        del context
        return tools if called else []  # noise begins with the output, whatever the seed

    agent = Agent(
        model,
        output_type=ToolOutput(Forecast),
        prepare_output_tools=outputs,
        model_settings=settings(),
        retries=0,
    )

    @agent.tool_plain
    def get_weather(city: Literal["Oslo", "Bergen"]) -> str:
        """The weather of a city."""
        called.append(city)
        return "rain"

    return agent


def check_agents(server: Server) -> None:
    """Agents that call a tool, read its result and end with a typed output, calls being `required`"""
    limits = UsageLimits(request_limit=20)
    for model in models(server):
        called: list[str] = []
        output = agent_with_tool(model, called).run_sync(PROMPT, usage_limits=limits).output
        assert isinstance(output, Forecast)
        assert called
