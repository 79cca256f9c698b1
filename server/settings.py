"""Every option of the server, once: flag, environment variable, default, limits, help text and group.

The command line is made from these fields, so that a flag and its environment variable cannot drift
apart. Imports neither torch nor a web framework: `speed --help` reads this module.
"""

import re
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


def _number_or_word(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _bytes(value: object) -> object:
    """ "512MiB" and its like as a number of bytes; anything else is left for the field's type to judge."""
    match = (
        re.fullmatch(r"([0-9]{1,15})\s*([a-z]*)", value.strip().lower()) if isinstance(value, str) else None
    )
    if match is None:
        return value
    if match[2] not in UNITS:
        raise ValueError("a size is a number of bytes, or one with KiB, MiB or GiB")
    return int(match[1]) * UNITS[match[2]]


def _ascending_depths(depths: tuple[int, ...]) -> tuple[int, ...]:
    if list(depths) != sorted(set(depths)):
        raise ValueError("depths must ascend and not repeat")
    return depths


DraftPolicyName = Literal["adaptive", "single", "gated", "recheck", "lookup", "none"]
CommaList = BeforeValidator(_split_commas)
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending_depths)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
ApiKey = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\x21-\x7e]+$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/]+)$")]


class SettingsError(ValueError):
    """An option that is well-formed but cannot be used; the message is one line that names it."""


# Headings of --help. "repeat": the flag may be given several times; "secret": its value is never shown.
MODEL: JsonDict = {"group": "model"}
ENGINE: JsonDict = {"group": "engine"}
NETWORK: JsonDict = {"group": "network"}
NAMES: JsonDict = {**MODEL, "repeat": True}
ORIGINS: JsonDict = {"group": "network", "repeat": True}
TLS: JsonDict = {"group": "TLS"}
TLS_SECRET: JsonDict = {"group": "TLS", "secret": True}
ACCESS: JsonDict = {"group": "access"}
KEYS: JsonDict = {"group": "access", "flag": "--api-key", "repeat": True, "secret": True}
LIMITS: JsonDict = {"group": "limits"}
LOGGING: JsonDict = {"group": "logging"}


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
        json_schema_extra=NAMES,
        description="comma separated names clients may use, the first one being the main name; "
        'default: "default" for the embedded model, the id of one from the hub, else the name of the folder',
    )
    chat_template: Path | None = Field(
        None,
        json_schema_extra=MODEL,
        description="file with the Jinja template that makes a prompt of messages; default: the model's",
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="auto: the model's generation_config.json gives the defaults of temperature, top_p, "
        "top_k, min_p and repetition_penalty, and ending tokens; none: it is not read",
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
    quantization: Literal["auto", "none", "int8"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="none; int8: weights of one byte (speed inspect says what it costs in loss); auto: int8 "
        "for a model that is stored so, where the CPU multiplies integers exactly",
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
    draft_policy: DraftPolicyName = Field(
        "adaptive",
        json_schema_extra=ENGINE,
        description="how tokens are drafted: adaptive, single, gated, recheck, lookup or none",
    )
    row_budget: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], BeforeValidator(_number_or_word)] = (
        Field(
            "auto",
            json_schema_extra=ENGINE,
            description="rows of a pass beyond which nothing is speculated; "
            "auto: by pass times measured at the first start",
        )
    )
    kv_cache_memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None,
        json_schema_extra=ENGINE,
        description="memory of the KV cache in bytes, or with KiB, MiB or GiB; "
        "default: by the free memory and max_num_seqs",
        ge=1,
    )
    kv_cache_tokens: int | None = Field(
        None, json_schema_extra=ENGINE, description="the same in tokens; goes before kv_cache_memory", ge=1
    )
    prefix_caching: bool = Field(
        True, json_schema_extra=ENGINE, description="keep what was read for prompts that begin alike"
    )
    threads: int = Field(
        0, json_schema_extra=ENGINE, description="CPU threads of the engine; 0: one per core", ge=0
    )
    deterministic: bool | None = Field(
        None,
        json_schema_extra=ENGINE,
        description="batch-invariant arithmetic: the same bits alone and in a batch, with and without "
        "speculation; slower, on a CPU only; default: for int8 weights in float32, where it costs least",
    )

    host: str = Field("127.0.0.1", json_schema_extra=NETWORK, description="address to listen on")
    port: int = Field(8000, json_schema_extra=NETWORK, description="port to listen on", ge=0, le=65535)
    root_path: str = Field(
        "",
        json_schema_extra=NETWORK,
        description="path under which a proxy serves this server, such as /llm",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
    )
    cors_origins: Annotated[list[Origin] | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=ORIGINS,
        description="comma separated origins whose pages may call this server from a browser, or *; "
        "default: none",
    )
    keep_alive: int = Field(
        75, json_schema_extra=NETWORK, description="seconds that an idle connection is kept open", ge=0
    )
    shutdown_timeout: float = Field(
        10.0,
        json_schema_extra=NETWORK,
        description="seconds that running requests get to finish at shutdown",
        ge=0,
    )

    ssl_certfile: Path | None = Field(
        None, json_schema_extra=TLS, description="certificate chain (PEM); with it the server speaks HTTPS"
    )
    ssl_keyfile: Path | None = Field(
        None, json_schema_extra=TLS, description="private key (PEM), if the certificate's file has none"
    )
    ssl_keyfile_password: str | None = Field(
        None, json_schema_extra=TLS_SECRET, description="password of the private key", repr=False
    )

    api_keys: Annotated[list[ApiKey] | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=KEYS,
        description="comma separated keys, one of which a client must send; others see a flag in the list "
        "of processes, so that a file or the environment is the better place; default: no key is asked for",
        repr=False,
    )
    api_key_file: Path | None = Field(
        None, json_schema_extra=ACCESS, description="file of keys, one a line; # begins a comment"
    )
    protect_metrics: bool = Field(
        False, json_schema_extra=ACCESS, description="ask for a key at /metrics too"
    )

    max_queued_requests: int = Field(
        256,
        json_schema_extra=LIMITS,
        description="sequences in flight, waiting ones included; more are answered with 429",
        ge=1,
    )
    max_queued_tokens: int = Field(
        2**20,
        json_schema_extra=LIMITS,
        description="tokens that the sequences in flight may grow to, prompts included; more are answered "
        "with 429, but a request that is alone is always taken",
        ge=1,
    )
    body_limit: int = Field(
        8 * 2**20, json_schema_extra=LIMITS, description="largest request body in bytes", ge=1
    )
    allow_unknown_fields: bool = Field(
        False,
        json_schema_extra=LIMITS,
        description="ignore unknown fields of requests instead of answering 400",
    )

    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", json_schema_extra=LOGGING, description="critical, error, warning, info or debug"
    )
    access_log: Literal["plain", "json", "off"] = Field(
        "plain",
        json_schema_extra=LOGGING,
        description="a line for each request on standard output, at level info: plain, json or off",
    )

    @property
    def model_names(self) -> list[str]:
        """The names under which the model is served; the first is the main one."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model == str(embedded_model()):
            return ["default"]
        return [self.model if is_hub_id(self.model) else Path(self.model).resolve().name]
