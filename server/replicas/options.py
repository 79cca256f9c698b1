"""Options of a cluster: those of `speed serve`, but for what is up to Ray Serve. No Ray here."""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError

from server.settings import Settings, SettingsError, check_variables

# What Ray's proxy does, or Ray itself.
OPTIONS_OF_RAY = frozenset({"port", "keep_alive", "shutdown_timeout", "max_connections", "max_header_bytes"})
OPTIONS_OF_RAY |= {
    "max_header_count",
    "request_timeout",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_keyfile_password",
}
# Of a server whose engines are its own: there they are ended and started again.
OPTIONS_OF_SEVERAL = frozenset({"model_dir", "max_loaded", "unload_idle"})
SECRETS = frozenset({"api_keys", "ssl_keyfile_password"})


def settings_of(args: Mapping[str, object]) -> Settings:
    """The settings; raises SettingsError for what is none, has no such value or is Ray's."""
    check_variables()
    try:
        settings = Settings(**cast("dict[str, Any]", args))
    except ValidationError as error:
        first = error.errors()[0]
        name, message = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        shown = name if name in SECRETS else f"{name} {args.get(name)!r}"
        raise SettingsError(f"{shown} is not valid: {message}") from None
    for name in sorted(settings.model_fields_set):  # the environment's among them
        if name in OPTIONS_OF_RAY:
            raise SettingsError(f"{name}: this is up to Ray Serve, see http_options of its configuration")
        if name in OPTIONS_OF_SEVERAL:
            raise SettingsError(
                f"{name} {getattr(settings, name)}: replicas have one model, which stays loaded; for another "
                "one add an application, or use `speed serve`"
            )
    return settings
