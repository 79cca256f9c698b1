"""instructor: classes filled in by tools, by schemas and by responses; partly, and several."""

from typing import Annotated, Literal

import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from pydantic import BaseModel, Field

from tests.clients.checks import MODEL, USER, Server, raising

SAMPLING = {"temperature": 1.0, "seed": 3, "max_tokens": 400}


class Forecast(BaseModel):
    """What a model of noise can fill in within a few tokens."""

    city: Literal["Oslo", "Bergen"]
    days: Annotated[int, Field(ge=1, le=9)]
    tags: Annotated[list[Literal["rain", "wind"]], Field(max_length=2)]


def client_of(server: Server, mode: instructor.Mode) -> instructor.Instructor:
    """A client of that mode, which doesn't ask again where an answer is wrong."""
    return instructor.from_openai(openai.OpenAI(base_url=server.openai_url, api_key="none"), mode=mode)


def fill(server: Server, mode: instructor.Mode) -> Forecast:
    """An instance from the first answer."""
    answer = client_of(server, mode).chat.completions.create(
        model=MODEL, messages=USER, response_model=Forecast, max_retries=0, **SAMPLING
    )
    assert isinstance(answer, Forecast)
    return answer


def check_tools(server: Server) -> None:
    """Structured output by tools, strict ones too"""
    fill(server, instructor.Mode.TOOLS)
    fill(server, instructor.Mode.TOOLS_STRICT)


def check_schemas(server: Server) -> None:
    """Structured output by json_schema"""
    fill(server, instructor.Mode.JSON_SCHEMA)


def check_partial(server: Server) -> None:
    """A class while it grows: the last is whole"""
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        parts = list(
            client_of(server, mode).chat.completions.create_partial(
                model=MODEL, messages=USER, response_model=Forecast, max_retries=0, **SAMPLING
            )
        )
        assert len(parts) > 1
        Forecast.model_validate(parts[-1].model_dump())


def check_several(server: Server) -> None:
    """Several instances in one answer, each shown when it is whole"""
    found = list(
        client_of(server, instructor.Mode.TOOLS).chat.completions.create_iterable(
            model=MODEL, messages=USER, response_model=Forecast, max_retries=0, **SAMPLING
        )
    )
    assert found
    assert all(isinstance(one, Forecast) for one in found)


class Unordered(BaseModel):
    """What no grammar can see to: that no value comes twice."""

    tags: set[str]


def check_errors(server: Server) -> None:
    """A class whose schema no grammar can follow is refused by name"""
    with raising(InstructorRetryException, "tools.0.function.parameters (of 'Unordered')"):
        client_of(server, instructor.Mode.TOOLS).chat.completions.create(
            model=MODEL, messages=USER, response_model=Unordered, max_retries=0
        )
