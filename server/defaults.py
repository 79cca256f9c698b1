"""What generation_config.json says about sampling, for requests that don't say it themselves.

As in vLLM: the model's maker knows at which temperature it writes best, and a client that sends a value
wins. `do_sample` and `max_new_tokens` are not read: a request says whether it samples, and OpenAI's API
how long an answer may be. (The ending tokens in the same file are the engine's: see model.ending.)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from server.schemas.sampling import SamplingFields
from server.settings import SettingsError

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

    Raises SettingsError for a file that is no JSON object, or a value that a request could not send.
    """
    file = folder / FILE
    if not file.is_file():
        return NO_DEFAULTS
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise SettingsError(f"{file} is not a JSON object; --generation-config none leaves it out")
    values = {name: content[name] for name in FIELDS if content.get(name) is not None}
    try:
        checked = SamplingFields.model_validate({"model": "", **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(
            f"{file}: {first['loc'][0]} is {first['input']!r}: {first['msg']}; "
            "--generation-config none leaves it out"
        ) from None
    return SamplingDefaults({name: getattr(checked, name) for name in values})
