"""What a body holds, counted while it arrives: the count is that of a parser, wherever chunks are cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ApiError, BodyTooLargeError, InvalidRequestError
from server.intake import BodyCounter
from server.limits import BODY_FLOOR, MAX_PARTS, BodyLimits, body_limits
from tests.fake_engine import INFO
from tests.loose import Json

TEXTS = st.text(st.sampled_from('a"\\,[]{}:é🙂\n'), max_size=8)
JSON = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=30,
)


def counts(value: Json) -> tuple[int, int]:
    """Strings, objects and lists; and commas."""
    if isinstance(value, str):
        return 1, 0
    if not isinstance(value, dict | list):
        return 0, 0
    entries = [*value, *value.values()] if isinstance(value, dict) else value
    inner = [counts(entry) for entry in entries]
    return 1 + sum(parts for parts, _ in inner), max(len(value) - 1, 0) + sum(commas for _, commas in inner)


def is_refused(body: bytes, cuts: list[int], limits: BodyLimits) -> bool:
    counter = BodyCounter(limits)
    borders = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    try:
        for start, end in pairwise(borders):
            counter.feed(body[start:end])
    except ApiError:
        return True
    return False


@settings(deadline=None)
@given(JSON, st.lists(st.integers(0, 10**4), max_size=6), st.booleans())
def test_a_body_is_refused_exactly_beyond_its_limits(value: Json, cuts: list[int], escaped: bool) -> None:
    body = json.dumps(value, ensure_ascii=escaped).encode()
    num_parts, num_commas = counts(value)
    least = BodyLimits(len(body), num_commas, num_parts)
    assert not is_refused(body, cuts, least)
    assert is_refused(body, cuts, least._replace(num_bytes=len(body) - 1))
    if num_parts:
        assert is_refused(body, cuts, least._replace(num_parts=num_parts - 1))
    if num_commas:
        assert is_refused(body, cuts, least._replace(num_values=num_commas - 1))


@pytest.mark.parametrize("entry", [b"{},", b"[],", b"[", b'"",', b'{"a":', b"1,", b"null,"])
def test_what_goes_on_for_ever_is_refused_early(entry: bytes) -> None:
    """Before more than a few hundred kilobytes of it are there."""
    with pytest.raises(InvalidRequestError, match="more than"):
        feed_often(BodyCounter(BodyLimits(2**40)), entry * (2**14 // len(entry)), times=50)


def test_a_text_that_goes_on_for_ever_is_refused_at_the_limit_of_bytes() -> None:
    with pytest.raises(BodyTooLargeError):
        feed_often(BodyCounter(BodyLimits(10**6)), b"a" * 2**14, times=100)


def feed_often(counter: BodyCounter, chunk: bytes, times: int) -> None:
    for _ in range(times):
        counter.feed(chunk)


def test_limits_of_bodies_follow_from_the_context() -> None:
    small, large = (
        INFO,
        type(INFO)(
            **{name: getattr(INFO, name) for name in INFO.__struct_fields__} | {"max_model_len": 10**6}
        ),
    )
    assert body_limits(small, 10, 1, 2**30).num_bytes == BODY_FLOOR + INFO.max_model_len * 30
    assert body_limits(small, 10, 4, 2**30).num_bytes == BODY_FLOOR + 4 * INFO.max_model_len * 30
    assert body_limits(large, 10, 1, 2**30).num_values == 10**6 + MAX_PARTS, "a context of ids fits"
    assert body_limits(large, 10, 1, 2**20).num_bytes == 2**20, "the option is the upper bound"
    assert body_limits(None, 10, 1, 2**20).num_bytes == 2**20
