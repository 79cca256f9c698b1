"""Grammars of requests: their limits, their translation for llguidance, and whether they compile.

Imports neither torch nor a tokenizer, so the API process may use it. Invariant: no text can kill or hang
whoever calls `check_grammar`. llguidance refuses what is too large or too ambiguous, but a long chain of
rules overflows its stack and a deep product of them takes minutes; so a grammar is compiled first in a
process of its own, with little stack, memory and time, and only what passes there is compiled elsewhere.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from model.grammar.schemas import JSON_BLANKS, adapt_schema
from model.protocol import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_BYTES = 128 * 1024
MAX_CHOICES = 1000
MAX_MESSAGE_CHARACTERS = 300
CHECK_CPU_SECONDS = 0.5  # ordinary schemas take a few milliseconds
CHECK_MEMORY_BYTES = 2**30
CHECK_STACK_BYTES = 2**21  # a quarter of what a main thread has
CHECK_WALL_SECONDS = 60.0  # for a machine with much else to do: half a second of CPU has taken 20
MAX_LEXER_STATES = 25_000  # of some 400 bytes each, for each of a sequence's two matchers
MAX_STEP_FUEL = 100_000  # for one mask: up to 10 ms, in which nobody else is served
# How a process ends that the grammar was too much for: no stack, no memory, a bug of the compiler.
_DEATHS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP}
_TOO_LARGE = "the grammar is too large or its rules lead too deep to be compiled"
_JSON_BLANKS = cast("JsonCompileOptions", JSON_BLANKS)

_UNKNOWN_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]", re.DOTALL)


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why in a bounded number of characters."""

    def __init__(self, message: str) -> None:
        shortened = len(message) > MAX_MESSAGE_CHARACTERS
        super().__init__(message[:MAX_MESSAGE_CHARACTERS] + "..." if shortened else message)


class CheckUnavailableError(Exception):
    """It could not be found out whether a grammar can be used: that is no verdict, and is not remembered."""


def check_grammar(grammar: Grammar) -> None:
    """Raises GrammarError unless `grammar` compiles within the limits and matches some text.

    Takes some 70 ms for a grammar not seen lately: call it off the event loop. Raises
    CheckUnavailableError if the machine lets no verdict come about; no `text` makes it raise anything else.
    """
    problem = _problem(grammar)
    if problem:
        raise GrammarError(problem)


def llguidance_text(grammar: Grammar) -> str:
    """`grammar` in llguidance's own notation; raises GrammarError if it has the wrong form for its kind."""
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_BLANKS)
    if grammar.kind == "json_schema":
        return _schema_text(grammar.text)
    if grammar.kind == "choice":
        return LLMatcher.grammar_from_lark(_choices_as_lark(grammar.text))
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def new_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the start of `grammar`; raises GrammarError if it does not compile."""
    matcher = LLMatcher(tokenizer, llguidance_text(grammar), log_level=0, limits=_limits())
    if matcher.is_error():
        raise GrammarError(in_words(matcher.get_error()))
    return matcher


def in_words(message: str) -> str:
    """llguidance's words without the state of its parser."""
    words = message.split("\n<", 1)[0].strip()
    if match := _UNKNOWN_KEYWORDS.fullmatch(words):
        keywords = match[1].replace('"', "")
        return f"keywords of the JSON schema that are not supported: {keywords}"
    if words.startswith("NoExtension"):
        return "the grammar matches no text"
    if "too many" in words.lower():  # of states, expressions or items: where the text has led to
        return f"the grammar is too complex to go on behind this text ({words})"
    return words


def _limits() -> LLParserLimits:
    """llguidance's defaults with less memory for lexer states and less time for a mask."""
    return LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES, step_lexer_fuel=MAX_STEP_FUEL, verbose_errors=False
    )


def _schema_text(schema: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(adapt_schema(schema), defaults=_JSON_BLANKS)
    except ValueError as error:
        raise GrammarError(f"the schema is not valid JSON: {error}") from error
    except RecursionError as error:
        raise GrammarError("the schema is nested too deeply") from error


def _choices_as_lark(text: str) -> str:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise GrammarError(f"the choices are not a JSON list of strings: {error}") from error
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise GrammarError(f"{len(choices)} choices were given; 1 to {MAX_CHOICES} are allowed")
    return "start: " + " | ".join(msgspec.json.encode(choice).decode() for choice in choices)


@lru_cache(64)
def _problem(grammar: Grammar) -> str | None:
    """What is wrong with a grammar, or None."""
    try:
        size = len(grammar.text.encode())
        if size > MAX_GRAMMAR_BYTES:
            return f"the grammar has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed"
        llguidance_text(grammar)
    except UnicodeEncodeError:
        return "the grammar is not valid Unicode: it has half of a surrogate pair"
    except GrammarError as error:
        return str(error)
    return None if grammar.kind == "json_object" else _compiled_elsewhere(grammar)


def _compiled_elsewhere(grammar: Grammar) -> str | None:
    """Compiles in another process, which may die of it; what is wrong, or None."""
    done = _run_check(msgspec.json.encode(grammar))
    if done.returncode == 0:
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(done.stdout, type=str) or None
    if done.returncode == -signal.SIGPROF:
        return f"the grammar takes more than {CHECK_CPU_SECONDS} s to compile"
    if -done.returncode in _DEATHS:
        return _TOO_LARGE
    raise CheckUnavailableError(f"the process that compiles grammars ended with status {done.returncode}")


def _run_check(grammar: bytes) -> "subprocess.CompletedProcess[bytes]":
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", "model.grammar.check"],
            input=grammar,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            timeout=CHECK_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # it is killed; its own time was not up, so the machine is busy
        raise CheckUnavailableError(
            f"the grammar was not compiled within {CHECK_WALL_SECONDS:.0f} s"
        ) from None
    except OSError as error:
        raise CheckUnavailableError(
            f"the process that compiles grammars can't be started: {error}"
        ) from error


# ---- the other process -------------------------------------------------------------------------


def main() -> None:
    """Reads a grammar from standard input and writes what is wrong with it, as a JSON string."""
    signal.setitimer(signal.ITIMER_PROF, CHECK_CPU_SECONDS)  # its signal ends the process
    for limit, value in ((resource.RLIMIT_AS, CHECK_MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    grammar = msgspec.json.decode(sys.stdin.buffer.read(), type=Grammar)
    threading.stack_size(CHECK_STACK_BYTES)
    problems: list[str] = []
    thread = threading.Thread(target=lambda: problems.append(_verdict(grammar)))
    thread.start()
    thread.join()
    (problem,) = problems  # a thread that raised has none, and this process fails
    sys.stdout.buffer.write(msgspec.json.encode(problem))


def _verdict(grammar: Grammar) -> str:
    try:
        return "".join(_problems(grammar))
    except BaseException:  # no memory, or a panic of the compiler, which is no Exception
        return _TOO_LARGE


def _problems(grammar: Grammar) -> list[str]:
    """Compiles over single bytes, where the first mask says whether anything matches at all."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes(grammar.special_tokens)))
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        llguidance_text(grammar), tokenizer if grammar.special_tokens else None, limits=_limits()
    )
    unknown = [message for message in messages if "no tokenizer" in message]
    if unknown:
        return ["special tokens cannot stand in a grammar"]
    if failed:
        return [in_words(messages[0])]
    matcher = LLMatcher(tokenizer, llguidance_text(grammar), log_level=0, limits=_limits())
    allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ~(1 << _Bytes.eos_token_id)
    if matcher.is_error():
        return [in_words(matcher.get_error())]
    return [] if allowed else ["the grammar matches no text"]


class _Bytes:
    """A tokenizer of the bytes, an end, and special tokens."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, special: Sequence[str]) -> None:
        named = [b"<end>", *(text.encode() for text in special)]
        self.tokens = [*(bytes([byte]) for byte in range(256)), *named]
        self.special_token_ids = [*range(256, len(self.tokens))]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


if __name__ == "__main__":
    main()
