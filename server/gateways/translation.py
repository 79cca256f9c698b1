"""A conversation in the chat API's messages, made of another API's, and what the client calls its parts.

Knows no API but chat's. Invariant: a complaint about a message, a tool or a field of the chat request names
the place in the client's own body from which it was made.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from server.complaints import complaint
from server.errors import ContextLengthError, InvalidRequestError
from server.lanes import Lane
from server.schemas.chat import ChatRequest

Json = dict[str, Any]
FEW = 64  # messages or items: a millisecond
# At the beginning of a complaint.
IN_LIST = re.compile(r"(messages|tools)\.(\d+)(?:\.tool_calls\.(\d+))?(?:\.function)?(?!\w)")


@dataclass
class _Turn:
    """A message while it grows. `places` are its own and those of its calls."""

    role: str
    places: list[str]
    texts: list[str] | None = None  # None: nothing was said, which is less than an empty text
    thoughts: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    call_id: str | None = None

    def message(self) -> Json:
        """The message."""
        parts = [{"type": "text", "text": text} for text in self.texts or ()]
        content = None if self.texts is None else self.texts[0] if len(parts) == 1 else parts
        message: Json = {"role": self.role, "content": content}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message if self.call_id is None else {**message, "tool_call_id": self.call_id}


class Turns:
    """Messages, added in their order. What belongs to one turn of an assistant becomes one message."""

    def __init__(self) -> None:
        self._turns: list[_Turn] = []

    @property
    def messages(self) -> list[Json]:
        """The messages as chat has them."""
        return [turn.message() for turn in self._turns]

    @property
    def places(self) -> list[list[str]]:
        """The place of each message, and of each of its calls."""
        return [turn.places for turn in self._turns]

    @property
    def is_begun(self) -> bool:
        """Whether the last message is an answer that is to go on."""
        last = self._last("assistant")
        return last is not None and any(last.texts or ()) and not last.calls

    def add(self, role: str, texts: Sequence[str], place: str) -> None:
        """A message of its own."""
        self._turns.append(_Turn(role, [place], [*texts]))

    def add_system(self, texts: Sequence[str], place: str) -> None:
        """A system message; those before all others become one, as most templates know only one."""
        if len(self._turns) == 1 and (first := self._last("system")):
            _extend(first, texts)
        else:
            self.add("system", texts, place)

    def add_user(self, texts: Sequence[str], place: str) -> None:
        """What a user said, in one turn with what the user said just before."""
        if last := self._last("user"):
            _extend(last, texts)
        else:
            self.add("user", texts, place)

    def add_thought(self, text: str, place: str) -> None:
        """Thoughts, which begin a turn of the assistant unless they go on."""
        if text:
            self._unanswered(place).thoughts.append(text)

    def add_answer(self, texts: Sequence[str], place: str) -> None:
        """What an assistant said; behind its thoughts if those were the last."""
        self._unanswered(place).texts = [*texts]

    def add_call(self, call_id: str, name: str, arguments: str | Json, place: str) -> None:
        """A call of a tool, in one turn with whatever the assistant said before it."""
        turn = self._last("assistant") or self._begin_answer(place)
        function = {"name": name, "arguments": arguments}
        turn.calls.append({"id": call_id, "type": "function", "function": function})
        turn.places.append(place)

    def add_result(self, call_id: str, texts: Sequence[str], place: str) -> None:
        """What a call gave."""
        self._turns.append(_Turn("tool", [place], [*texts], call_id=call_id))

    def _unanswered(self, place: str) -> _Turn:
        """The assistant's turn in which nothing but thoughts was said, or a new one."""
        last = self._last("assistant")
        return last if last and last.texts is None and not last.calls else self._begin_answer(place)

    def _begin_answer(self, place: str) -> _Turn:
        self._turns.append(_Turn("assistant", [place]))
        return self._turns[-1]

    def _last(self, role: str) -> _Turn | None:
        """The last message, if that role has it."""
        return self._turns[-1] if self._turns and self._turns[-1].role == role else None


def _extend(turn: _Turn, texts: Sequence[str]) -> None:
    turn.texts = turn.texts or []
    turn.texts += texts


@dataclass(frozen=True)
class Names:
    """What the client calls the fields of a chat request that was made of its own body."""

    fields: Mapping[str, str]  # by the names that chat has
    parameters: str  # of a tool
    messages: Sequence[Sequence[str]]  # the place of each one, and of each of its calls
    tools: Sequence[str]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within it, complaints about the chat request are told in the client's names."""
        try:
            yield
        except InvalidRequestError as error:
            self._translate(error)
            raise

    def _translate(self, error: InvalidRequestError) -> None:
        if found := IN_LIST.match(error.message):
            place = self._place(found)
            rest = error.message[found.end() :].replace(".parameters", f".{self.parameters}", 1)
            error.message = place + rest
            error.param = place.partition(".")[0]
            return
        param = error.param or ""
        error.param = self.fields.get(param, param) or None
        for name in (param, "max_tokens"):
            if name in self.fields and error.message.startswith(name):
                error.message = self.fields[name] + error.message[len(name) :]
        if isinstance(error, ContextLengthError):
            for name, new in self.fields.items():
                error.message = error.message.replace(f"in {name}", f"in {new}").replace(
                    f"length of the {name}", f"length of the {new}"
                )

    def _place(self, found: re.Match[str]) -> str:
        index = int(found[2])
        if found[1] == "tools":
            return self.tools[index]
        return self.messages[index][0 if found[3] is None else 1 + int(found[3])]


@dataclass(frozen=True)
class Translated:
    """A request in the chat API's terms. `skipped`: types of tools that aren't served."""

    chat: ChatRequest
    names: Names
    skipped: Sequence[str] = ()


async def translate(work: Callable[[], Translated], num_items: int, lane: Lane) -> Translated:
    """The result of `work`, which is done at once if it is little."""
    return work() if num_items <= FEW else await lane.run(work)


def chat_request(fields: Json, names: Names, kind: type[ChatRequest] = ChatRequest) -> ChatRequest:
    """`fields` as a request; raises InvalidRequestError in the client's names."""
    with names.told():
        try:
            chat = kind.model_validate(fields)
        except ValidationError as error:
            raise complaint(error, fields) from None
        chat.reject_extra_fields(allow_unknown=False)
    return chat
