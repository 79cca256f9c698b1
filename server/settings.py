"""Every option of the server, once: flag, environment variable, default, limits, help text and group.

The command line is made from these fields, so that a flag and its environment variable cannot drift
apart. Imports neither torch nor a web framework: `speed --help` reads this module.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.hub import is_hub_id

ENV_PREFIX = "SPEED_"


def embedded_model() -> Path:
    """The folder of the default model that comes with the package; found without importing the package."""
    spec = find_spec("model")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "weights" / "default"


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _ascending_depths(depths: tuple[int, ...]) -> tuple[int, ...]:
    if list(depths) != sorted(set(depths)):
        raise ValueError("depths must ascend and not repeat")
    return depths


CommaList = BeforeValidator(_split_commas)
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending_depths)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


# Headings of --help.
MODEL: JsonDict = {"group": "model"}
ENGINE: JsonDict = {"group": "engine"}
HTTP: JsonDict = {"group": "http"}


class Settings(BaseSettings):
    """All options. A flag wins over the environment variable, that over the default."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True)

    model: str = Field(
        default_factory=lambda: str(embedded_model()),
        description="a folder with config.json, *.safetensors and (for text) tokenizer.json, or a Hugging "
        "Face id ORG/NAME; default: the embedded model",
        json_schema_extra=MODEL,
    )
    revision: str | None = Field(
        None,
        json_schema_extra=MODEL,
        description="branch, tag or commit of a Hugging Face id; default: its main branch",
        min_length=1,
    )
    served_model_name: Annotated[Names | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=MODEL,
        description="comma separated names clients may use, the first one being the main name; "
        'default: "default" for the embedded model, the id of one from the hub, else the name of the folder',
    )
    chat_template: Path | None = Field(
        None,
        json_schema_extra=MODEL,
        description="file with the Jinja template that makes a prompt of messages; default: the model's",
    )
    device: str = Field(
        "auto",
        json_schema_extra=MODEL,
        description="auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="type of weights and cache: auto, float32, bfloat16 or float16",
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        json_schema_extra=MODEL,
        description="none, or int8: weights of one byte (speed inspect says what it costs in loss)",
    )
    max_model_len: int | None = Field(
        None,
        json_schema_extra=MODEL,
        description="tokens of prompt and completion together; default: the model's",
        ge=1,
    )

    draft_depths: Annotated[Depths | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=ENGINE,
        description="comma separated depths at which tokens are drafted; default: the model's",
    )
    max_num_seqs: int = Field(
        32, json_schema_extra=ENGINE, description="sequences that run at the same time", ge=1
    )
    prefill_chunk_size: int = Field(
        64, json_schema_extra=ENGINE, description="positions of one prompt that enter a pass together", ge=1
    )
    row_budget: int = Field(
        32, json_schema_extra=ENGINE, description="rows of a pass beyond which nothing is speculated", ge=1
    )
    kv_cache_tokens: int | None = Field(
        None,
        json_schema_extra=ENGINE,
        description="tokens the KV cache holds; default: by the free memory",
        ge=1,
    )
    threads: int = Field(
        0, json_schema_extra=ENGINE, description="CPU threads of the engine; 0: one per core", ge=0
    )

    host: str = Field("127.0.0.1", json_schema_extra=HTTP, description="address to listen on")
    port: int = Field(8000, json_schema_extra=HTTP, description="port to listen on", ge=0, le=65535)
    max_queued_requests: int = Field(
        256,
        json_schema_extra=HTTP,
        description="sequences in flight, waiting ones included; more are answered with 429",
        ge=1,
    )
    body_limit: int = Field(
        8 * 2**20, json_schema_extra=HTTP, description="largest request body in bytes", ge=1
    )
    keep_alive: int = Field(
        75, json_schema_extra=HTTP, description="seconds that an idle connection is kept open", ge=0
    )
    shutdown_timeout: float = Field(
        10.0,
        json_schema_extra=HTTP,
        description="seconds that running requests get to finish at shutdown",
        ge=0,
    )
    allow_unknown_fields: bool = Field(
        False,
        json_schema_extra=HTTP,
        description="ignore unknown fields of requests instead of answering 400",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", json_schema_extra=HTTP, description="critical, error, warning, info or debug"
    )

    @property
    def model_names(self) -> list[str]:
        """The names under which the model is served; the first is the main one."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model == str(embedded_model()):
            return ["default"]
        return [self.model if is_hub_id(self.model) else Path(self.model).resolve().name]
