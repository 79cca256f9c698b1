"""What generation_config.json says about sampling, for requests that don't say it themselves.

As in vLLM: the model's maker knows at which temperature it writes best, and a client that sends a value
wins. `do_sample` and `max_new_tokens` are not read: a request says whether it samples, and OpenAI's API
how long an answer may be. (The ending tokens in the same file are the engine's: see
model.checkpoint.ending.)
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from model.checkpoint.hub import LfsPointerError, read_file
from server.schemas.sampling import SamplingFields
from server.settings import SettingsError

log = logging.getLogger(__name__)

FILE = "generation_config.json"
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Body = TypeVar("Body", bound=SamplingFields)


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of fields that a request may leave out; none by default."""

    values: Mapping[str, float]

    def apply(self, body: Body) -> Body:
        """A body with the defaults in place of the fields that the client did not send."""
        missing = {name: value for name, value in self.values.items() if name not in body.model_fields_set}
        return body.model_copy(update=missing) if missing else body


NO_DEFAULTS = SamplingDefaults({})


def load_defaults(folder: Path) -> SamplingDefaults:
    """The defaults of the model in `folder`; none without the file.

    A value that a request could not send is left out with a warning: makers of models write -1 for "off", and
    numbers as text. Raises SettingsError for a file that is no JSON object.
    """
    file = folder / FILE
    if not file.is_file():
        return NO_DEFAULTS
    return SamplingDefaults(dict(_values(_content(file))))


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_file(file))
    except LfsPointerError as error:
        raise SettingsError(str(error)) from None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SettingsError(f"{file} is not a JSON object; --generation-config none leaves it out")
    return content


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name in FIELDS:
        if content.get(name) is None:
            continue
        try:
            checked = SamplingFields.model_validate({"model": "", name: content[name]})
        except ValidationError as error:
            log.warning(
                "%s: %s is %r and is left out: %s", FILE, name, content[name], error.errors()[0]["msg"]
            )
        else:
            yield name, getattr(checked, name)
