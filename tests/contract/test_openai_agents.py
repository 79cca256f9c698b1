"""The `openai-agents` package over /v1/responses: an agent calls a tool, reads its result and answers."""

import json

import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled

from model.protocol import GenerationRequest
from tests.contract.test_responses import client_of, saying
from tests.contract.test_tools import call
from tests.fake_engine import EOS
from tests.text_tools import ids_of


def model(request: GenerationRequest) -> list[int]:
    """Calls a tool, and answers with its result."""
    prompt = bytes(request.prompt_token_ids).decode()
    if "tool:rain;" in prompt:
        return [*ids_of("<think>It rains.</think>Take an umbrella."), EOS]
    return [*ids_of(f"<think>I must ask.</think>I ask.\n{call('Oslo')}"), EOS]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_agent(streamed: bool) -> None:
    set_tracing_disabled(True)
    asked: list[str] = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    async with saying(model, tokens_per_event=3, reasoning_parser="think") as served:
        client = client_of(served)
        agent = Agent(
            name="weather",
            instructions="Be brief.",
            model=OpenAIResponsesModel("default", client),
            model_settings=ModelSettings(temperature=0.5, store=False),
            tools=[get_weather],
        )
        if streamed:
            running = Runner.run_streamed(agent, "Do I need an umbrella in Oslo?")
            kinds = [event.type async for event in running.stream_events()]
            assert "run_item_stream_event" in kinds
            output = running.final_output
        else:
            output = (await Runner.run(agent, "Do I need an umbrella in Oslo?")).final_output
        await client.close()
    assert (asked, output) == (["Oslo"], "Take an umbrella.")
    first, second = served.engine.requests
    # The package asks for schemas that are followed, so that calls are made of a grammar.
    assert first.grammar is not None
    prompt = bytes(second.prompt_token_ids).decode()
    assert (
        f"assistant:I ask.<tool_call>get_weather{json.dumps({'city': 'Oslo'})}</tool_call>;tool:rain"
        in prompt
    )
