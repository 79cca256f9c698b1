"""Control tokens in what users write: disguised while a template renders it, and read as plain text after.

A tokenizer turns `<|im_end|>` into one token wherever it stands, so that a user's text could end a turn and
forge another. The characters of such a text are therefore exchanged for private ones before the template
sees it, and exchanged back behind the tokenizer's search for control tokens. Invariants: every control token
of an encoded conversation was written by the template; what stands elsewhere is encoded as the tokenizer
encodes a text that has no control tokens; texts without anything that could become one are not touched.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer, models

from server.errors import InvalidRequestError

LAST_PRIVATE = 0x10FFFD  # of Unicode's last plane, which has no characters of its own
# Some checkpoints forgot to mark the borders of their turns as special.
_BORDER = re.compile(r"<[|｜].+[|｜]>")

Value = TypeVar("Value")


class _Span(NamedTuple):
    """A control token in a text: its first character, the one behind it, and its id."""

    start: int
    end: int
    token_id: int


class Disguise:
    """Hides control tokens of one tokenizer in texts, and encodes what a template made of these.

    Never changed after construction: threads may share it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in added.items() if _is_control(token)}
        alphabet = sorted(set("".join(self._ids)))
        first = LAST_PRIVATE - len(alphabet)
        self._hidden = {ord(c): chr(first + i) for i, c in enumerate(alphabet)}
        self._shown = {ord(hidden): chr(c) for c, hidden in self._hidden.items()}
        self._mark = chr(LAST_PRIVATE)  # stands for a control token that the template wrote
        self._reserved = re.compile(f"[{chr(first)}-{self._mark}]")
        self._prefixes = frozenset(text[:i] for text in self._ids for i in range(1, len(text)))
        self._suffixes = frozenset(text[i:] for text in self._ids for i in range(1, len(text)))
        self._longest = max(map(len, self._ids), default=0)
        self._finder = _finder(tokenizer, list(added.values()))
        self._beginning = _beginning([token for token in added.values() if token.content in self._ids])
        self._plain = _plain(tokenizer, self._ids, self._mark)
        self._mark_id = self._plain.token_to_id(self._mark)

    def hide(self, value: Value, *, with_names: bool = False) -> Value:
        """`value` with every control token in its texts disguised, and every part that may become one.

        Texts may stand in lists and objects, whose names are left alone unless `with_names`. Returns `value`
        itself if there is nothing to hide. Raises InvalidRequestError for a control token beside the
        characters that hide it.
        """
        try:
            texts = list(dict.fromkeys(_texts_in(value, with_names=with_names)))
        except RecursionError:
            field = "tools" if with_names else "chat_template_kwargs"
            raise InvalidRequestError(f"{field} is nested too deeply", param=field) from None
        suspects = [text for text in texts if self._beginning.search(text)]
        spans = dict(zip(suspects, self._find(suspects), strict=True))
        hidden = {text: self._hide(text, spans.get(text, [])) for text in texts}
        changed = {text: other for text, other in hidden.items() if text != other}
        if not changed:
            return value
        if any(self._reserved.search(text) for text in texts):
            raise InvalidRequestError(
                "messages: a control token of the model stands beside private characters of Unicode's last "
                "plane, which this server needs to hide it",
                param="messages",
            )
        exchanged: Value = _exchange(value, changed, with_names=with_names)
        return exchanged

    def show(self, text: str) -> str:
        """`text` as it would be without disguise."""
        return text.translate(self._shown)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text that a template made of hidden values: what was hidden is plain text.

        Raises InvalidRequestError where the tokenizer has no plain tokens for it.
        """
        (found,) = self._find([text])
        # A normalizer may drop private characters, so that what is hidden falls out of a match.
        spans = [span for span in found if not self._reserved.search(text, span.start, span.end)]
        for apart in (False, True):
            ids = self._encode(text, spans, add_special_tokens=add_special_tokens, apart=apart)
            if ids is not None:
                return ids
        raise InvalidRequestError(
            "messages: a control token of the model stands in a text, and the model's tokenizer has no other "
            "tokens to write it with",
            param="messages",
        )

    def _encode(
        self, text: str, spans: Sequence[_Span], *, add_special_tokens: bool, apart: bool
    ) -> list[int] | None:
        """None if a control token came out of plain text; `apart` keeps its characters apart."""
        pieces: list[str] = []
        token_ids: list[int | None] = []  # for each mark; None: it only separates
        end = 0
        for span in (*spans, _Span(len(text), len(text), -1)):
            plain = self._apart(text[end : span.start]) if apart else text[end : span.start]
            pieces += [self.show(plain), self._mark]
            token_ids += [*([None] * plain.count(self._mark)), span.token_id]
            end = span.end
        whole = "".join(pieces[:-1])
        (encoding,) = self._plain.encode_batch([whole], add_special_tokens=add_special_tokens)
        return self._with_control_tokens(encoding, iter(token_ids))

    def _with_control_tokens(self, encoding: Encoding, marked: Iterator[int | None]) -> list[int] | None:
        control = frozenset(self._ids.values())
        ids: list[int] = []
        for token_id, is_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token_id != self._mark_id:
                if token_id in control and not is_added:
                    return None
                ids.append(token_id)
            elif (own := next(marked)) is not None:
                ids.append(own)
        return ids

    def _apart(self, text: str) -> str:
        """The text with a mark between the characters of everything that was hidden."""
        return re.sub(f"({self._reserved.pattern})(?={self._reserved.pattern})", rf"\1{self._mark}", text)

    def _find(self, texts: Sequence[str]) -> list[list[_Span]]:
        """The control tokens in each of the texts."""
        found = self._finder.encode_batch(list(texts), add_special_tokens=False) if texts else []
        return [
            [
                _Span(start, end, self._ids[content])
                for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                # Not encoding.tokens: those have the blanks that a token takes along.
                if (content := self._finder.id_to_token(token_id)) in self._ids
            ]
            for encoding in found
        ]

    def _hide(self, text: str, spans: Sequence[_Span]) -> str:
        head, tail = self._border_parts(text)
        pieces, end = [text[:head].translate(self._hidden)], head
        for start, stop in [*((span.start, span.end) for span in spans), (tail, len(text))]:
            pieces += [text[end:start], text[max(start, end) : stop].translate(self._hidden)]
            end = max(end, stop)
        return "".join(pieces)

    def _border_parts(self, text: str) -> tuple[int, int]:
        """Ends of what could be the end of a control token begun before, begin of one that goes on behind.

        Blanks at both ends don't count, because templates strip them.
        """
        end, start = len(text.rstrip()), len(text) - len(text.lstrip())
        sizes = range(min(self._longest, end - start), 0, -1)
        head = next((start + n for n in sizes if text[start : start + n] in self._suffixes), 0)
        tail = next((end - n for n in sizes if text[end - n : end] in self._prefixes), len(text))
        return head, tail


def _is_control(token: AddedToken) -> bool:
    marked = token.special or _BORDER.fullmatch(token.content) is not None
    return marked and bool(token.content.strip())


def _beginning(control: Sequence[AddedToken]) -> re.Pattern[str]:
    """Found in every text that holds one of the tokens: most texts need no further look."""
    if any(token.normalized for token in control):  # the normalizer may make it of other characters
        return re.compile("")
    firsts = sorted({token.content[0] for token in control})
    return re.compile(f"[{''.join(map(re.escape, firsts))}]" if firsts else "(?!)")


def _finder(tokenizer: Tokenizer, added: Sequence[AddedToken]) -> Tokenizer:
    """A tokenizer that finds the same added tokens, and makes one token of whatever stands between."""
    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    if tokenizer.normalizer is not None:
        finder.normalizer = tokenizer.normalizer
    finder.add_tokens(list(added))
    return finder


def _plain(tokenizer: Tokenizer, control: Mapping[str, int], mark: str) -> Tokenizer:
    """The tokenizer without its control tokens, and with one for `mark`."""
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] |= token["content"] in control
    plain = Tokenizer.from_str(json.dumps(definition))
    plain.encode_special_tokens = True
    plain.add_tokens([AddedToken(mark, normalized=False, special=False)])
    return plain


def _texts_in(value: object, *, with_names: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if with_names:
            yield from value
        for inner in value.values():
            yield from _texts_in(inner, with_names=with_names)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner, with_names=with_names)


def _exchange(value: Any, texts: Mapping[str, str], *, with_names: bool) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, dict):
        return {
            texts.get(key, key) if with_names else key: _exchange(inner, texts, with_names=with_names)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_exchange(inner, texts, with_names=with_names) for inner in value]
    return value
