"""Every option of the server, once: flag, environment variable, default, limits, help text and group.

The command line is made from these fields, so that a flag and its environment variable cannot drift
apart. Imports neither torch nor a web framework: `speed --help` reads this module.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from model.checkpoint.hub import is_hub_id
from model.options import (
    DEFAULT_BACKEND,
    ENGINE_DEFAULTS,
    POLICIES,
    BackendName,
    DraftPolicyName,
    DtypeName,
    KVCacheDtypeName,
    QuantizationName,
)
from server.limits import MAX_STOP_TOKEN_IDS

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


CommaList = BeforeValidator(_split_commas)
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending_depths)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
ApiKey = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[\x21-\x7e]+$")]
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/]+)$")]


Host = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])$")]


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
HOSTS: JsonDict = {"group": "access", "repeat": True}
LIMITS: JsonDict = {"group": "limits"}
LOGGING: JsonDict = {"group": "logging"}


# What Kubernetes puts into every pod beside a Service named "speed": SPEED_PORT=tcp://10.96.12.7:8000.
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
SERVICE_LINK_NAMES = re.compile(
    rf"{ENV_PREFIX}(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_.*)?)"
)
# A server that was meant to be guarded must not start open, so that an empty value is not the default here.
GUARDS = ("api_keys", "api_key_file")


class _Environment(EnvSettingsSource):
    """The library's reader of the environment, which knows what Kubernetes writes there."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        """The value as text, the variable's name, and whether it is JSON."""
        value, key, is_complex = super().get_field_value(field, field_name)
        if field_name == "port" and isinstance(value, str) and SERVICE_LINK.match(value):
            value = None
        if field_name in GUARDS and os.environ.get(ENV_PREFIX + field_name.upper()) == "":
            value = ""
        return value, key, is_complex


def unknown_variables() -> list[str]:
    """Names in the environment that look like options but are none, those of Kubernetes excepted."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    named = {name for name in os.environ if name.startswith(ENV_PREFIX)}
    return sorted(name for name in named - known if not SERVICE_LINK_NAMES.fullmatch(name))


def check_variables() -> None:
    """Raises SettingsError for a variable that nobody reads, but without which the server would be open."""
    if ENV_PREFIX + "API_KEY" in os.environ:
        raise SettingsError(f"{ENV_PREFIX}API_KEY is not read: keys belong in {ENV_PREFIX}API_KEYS")


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
    model_dir: Path | None = Field(
        None,
        json_schema_extra=MODEL,
        description="a folder whose subfolders with a config.json are models too, each served under the name "
        "of its folder and loaded by the first request for it",
    )
    max_loaded: int | None = Field(
        None,
        json_schema_extra=MODEL,
        description="models that may be loaded at the same time; for one more the one that has been idle for "
        "the longest is unloaded; default: those that are named one by one, at least one",
        ge=1,
    )
    unload_idle: float | None = Field(
        None,
        json_schema_extra=MODEL,
        description="seconds without a request after which a model is unloaded; the next request for it "
        "loads it again; default: never",
        gt=0,
    )
    chat_template: Path | None = Field(
        None,
        json_schema_extra=MODEL,
        description="file with the Jinja template that makes a prompt of messages; default: the model's",
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="how the template wants the content of a message: string (one text), openai (a list of "
        "parts) or auto (parts if it loops over them)",
    )
    reasoning_parser: Literal["auto", "none", "think"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="think: what a model writes between <think> and </think> is answered as reasoning; none: "
        "it is text; auto: think if the chat template or the tokenizer knows these tags",
    )
    tool_call_parser: Literal["auto", "none", "hermes", "qwen3_coder"] = Field(
        "auto",
        json_schema_extra=MODEL,
        description="format in which the model calls tools: hermes (JSON between tags), qwen3_coder (a tag "
        "for each parameter), none, or auto: the one that the chat template speaks of",
    )
    tool_template: Literal["model", "generic"] = Field(
        "model",
        json_schema_extra=MODEL,
        description="how tools are told to the model: model, by its chat template; generic, in a system "
        "message that any chat template can show, with calls in the format hermes",
    )
    allow_special_tokens_in_content: bool = Field(
        False,
        json_schema_extra=MODEL,
        description="let special tokens in the texts of messages end turns and begin others, instead of "
        "reading them as the plain texts that they are written with",
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
    backend: BackendName = Field(
        DEFAULT_BACKEND,
        json_schema_extra=MODEL,
        description="what runs the passes: native, the compiled library for CPUs (docs/models.md says how "
        "it is compiled), cuda, kernels for NVIDIA GPUs, torch, or auto: native or cuda, whichever is for "
        "the device, where it covers the model, else torch",
    )
    dtype: DtypeName = Field(
        "auto",
        json_schema_extra=MODEL,
        description="type of weights and activations: auto, float32, bfloat16 or float16",
    )
    quantization: QuantizationName = Field(
        "auto",
        json_schema_extra=MODEL,
        description="none; int8: weights of one byte; int4: of half a byte, native passes alone (speed "
        "inspect --text says what they cost in loss); auto: int8 for a model that is stored so, where native "
        "passes run",
    )
    kv_cache_dtype: KVCacheDtypeName = Field(
        "auto",
        json_schema_extra=MODEL,
        description="what K/V is held in: float32, bfloat16, float16, or int8 with a scale for each position "
        "and head (speed inspect --text says what it costs in loss); auto: float16 in native passes, else "
        "the type of the passes",
    )
    max_model_len: int | None = Field(
        None,
        json_schema_extra=MODEL,
        description="tokens of prompt and completion together; default: the model's",
        ge=1,
    )
    max_loops: int | None = Field(
        None,
        json_schema_extra=MODEL,
        description="loops that a request may ask for with num_loops, with K/V for them; above the model's "
        "own only where it is trained for many (Dory, Huginn, retrofits); default: the model's",
        ge=1,
    )

    draft_depths: Annotated[Depths | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=ENGINE,
        description="comma separated depths at which tokens are drafted; default: the model's",
    )
    max_num_seqs: int = Field(
        ENGINE_DEFAULTS.max_num_seqs,
        json_schema_extra=ENGINE,
        description="sequences that run at the same time",
        ge=1,
    )
    prefill_chunk_size: int = Field(
        ENGINE_DEFAULTS.prefill_chunk_size,
        json_schema_extra=ENGINE,
        description="positions of one prompt that enter a pass together",
        ge=1,
    )
    pass_time_factor: float = Field(
        ENGINE_DEFAULTS.pass_time_factor,
        json_schema_extra=ENGINE,
        description="how many times as long a pass may take for prompts that are read beside other requests; "
        "more answers new requests earlier and lets running ones wait longer for each token",
        ge=1,
        le=1000,
    )
    draft_policy: DraftPolicyName = Field(
        ENGINE_DEFAULTS.draft_policy,
        json_schema_extra=ENGINE,
        description=f"how tokens are drafted: {', '.join(POLICIES[:-1])} or {POLICIES[-1]}",
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
        description="the same bits alone and in a batch, with and without speculation: native passes always "
        "give them and the option changes nothing; where torch runs the passes it is refused",
    )

    worker_timeout: float = Field(
        300.0,
        json_schema_extra=ENGINE,
        description="seconds of silence after which the engine's process is taken for hung and replaced; "
        "it speaks after every pass, so that no pass may take longer",
        ge=1,
    )
    load_timeout: float = Field(
        1800.0,
        json_schema_extra=ENGINE,
        description="seconds that the engine's process gets to load the model before it is replaced",
        ge=1,
    )

    standby_engine: bool = Field(
        False,
        json_schema_extra=ENGINE,
        description="keep a second engine process that has started but loaded no model: after a fault it "
        "serves sooner by the time that this takes, and costs the memory of a process with torch in it",
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
    ping_interval: float = Field(
        15.0,
        json_schema_extra=NETWORK,
        description="seconds of silence after which a stream gets a comment, and its headers if they were "
        "not sent yet, lest a proxy or a client give up",
        gt=0,
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
    share_prefix_cache: bool = Field(
        False,
        json_schema_extra=ACCESS,
        description="let requests with different API keys share what was read of prompts that begin alike; "
        "then cached_tokens tells one what another has asked",
    )
    allowed_hosts: Annotated[list[Host] | None, NoDecode, CommaList] = Field(
        None,
        json_schema_extra=HOSTS,
        description="comma separated host names, without port, that requests may be addressed to besides "
        "those of this machine itself (localhost, 127.0.0.1, [::1]); *.NAME for all below a name, * for any; "
        "default: none where the server listens on a loopback address and asks for no key, so that no page "
        "can reach it by a name of its own, else any",
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
    max_queued_tokens: int | None = Field(
        None,
        json_schema_extra=LIMITS,
        description="tokens that the sequences in flight may grow to, prompts included; more are answered "
        "with 429, but a request that is alone is always taken; default: eight times what the engine runs at "
        "once (max_num_seqs sequences of the whole context, or the KV cache if that holds more)",
        ge=1,
    )
    allow_priority: bool = Field(
        False,
        json_schema_extra=LIMITS,
        description="let requests say their priority; without it all are alike, and 400 answers another one",
    )
    max_connections: int | None = Field(
        None,
        json_schema_extra=LIMITS,
        description="connections at the same time; at one more the one that has waited longest for its "
        "client is closed, or 503 answered if all are being served; default: the limit of open files, less "
        "what the server needs itself, at most 4096",
        ge=1,
    )
    max_header_bytes: Annotated[int, BeforeValidator(_bytes)] = Field(
        32 * 2**10,
        json_schema_extra=LIMITS,
        description="bytes of a request before its body; more are answered with 431",
        ge=1024,
    )
    max_header_count: int = Field(
        128, json_schema_extra=LIMITS, description="headers of a request; more are answered with 431", ge=16
    )
    max_stop_token_ids: int = Field(
        256,
        json_schema_extra=LIMITS,
        description="stop_token_ids of a request, each of whose sequences carries them; "
        f"at most {MAX_STOP_TOKEN_IDS}",
        ge=0,
        le=MAX_STOP_TOKEN_IDS,
    )
    request_timeout: float = Field(
        60.0,
        json_schema_extra=LIMITS,
        description="seconds in which a request must have arrived, its body included; 408 is the answer else",
        gt=0,
    )
    body_limit: int = Field(
        4 * 2**20,
        json_schema_extra=LIMITS,
        description="largest request body in bytes; less where the context of the model needs less",
        ge=1,
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
        description="a line for each request on standard output, at level info, or debug for those of "
        "/health, /ready and /metrics: plain, json or off",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment; no other source."""
        return init_settings, _Environment(settings_cls)

    @property
    def asks_for_key(self) -> bool:
        """Whether clients need a key. (A file without keys is an error.)"""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def model_names(self) -> list[str]:
        """The names under which the model is served; the first is the main one."""
        if self.served_model_name is not None:
            return self.served_model_name
        if self.model == str(embedded_model()):
            return ["default"]
        return [self.model if is_hub_id(self.model) else Path(self.model).resolve().name]
