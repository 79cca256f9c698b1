"""Which grammars are taken, which are refused and with what words; and that none does any harm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.grammar import check as check_module
from model.grammar.check import MAX_MESSAGE_CHARACTERS, CheckUnavailableError, GrammarError, check_grammar
from model.protocol import Grammar, GrammarKind
from tests.loose import Json


def chain(count: int) -> str:
    """A grammar whose rules lead from one to the next: its compiler calls itself as deep."""
    return "\n".join(f'r{i}: "a" r{i + 1}' for i in range(count)) + f'\nr{count}: "b"\nstart: r0\n'


def product(count: int) -> str:
    """A terminal of 2^count letters."""
    return "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(count)) + f'\nT{count}: "b"\nstart: T0\n'


def reference_chain(count: int) -> str:
    definitions: dict[str, Json] = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{count}": {"type": "string"}}})


def nested_arrays(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
        (
            "json_schema",
            '{"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}',
        ),
        ("json_schema", "{}"),
        ("json_schema", nested_arrays(100)),
        ("json_schema", '{"type": "array", "maxItems": 1000000000}'),
        ("regex", r"^\d{3}-\d{4}$"),
        ("regex", "(a+)+"),
        ("regex", ".*a.{5000}"),
        ("choice", r'["yes", "no", "line\n\"\ud83d\ude00"]'),
        ("lark", 'start: "a" start | "b"'),
        ("lark", "start: e\ne: e e e | e e | /[a-z]/"),
    ],
)
def test_a_sound_grammar_is_taken(kind: GrammarKind, text: str) -> None:
    check_grammar(Grammar(kind=kind, text=text))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type":', "not valid JSON"),
        ("json_schema", "[1]", "schema"),
        ("json_schema", '{"type": "triangle"}', "triangle"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "#"}', "matches no text"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "does not fetch"),
        ("json_schema", nested_arrays(1000), "nested too deeply"),
        ("json_schema", reference_chain(1500), "lead too deep"),
        ("json_schema", '"' + "x" * 200_000 + '"', "at most 131072"),
        ("regex", "(", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "", "matches no text"),
        ("regex", "\ud83d", "surrogate"),
        ("choice", "[]", "0 choices"),
        ("choice", json.dumps(["a"] * 1001), "1001 choices"),
        ("choice", '{"a": 1}', "list of strings"),
        ("choice", '[""]', "matches no text"),
        ("choice", r'["\ud83d"]', "list of strings"),
        ("lark", "start: (", "Expected"),
        ("lark", "start: start", "matches no text"),
        ("lark", "start: <|eos|>", "special tokens"),
        ("lark", chain(4000), "lead too deep"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_with_its_reason(
    kind: GrammarKind, text: str, message: str
) -> None:
    """Chains of 4,000 rules overflowed the stack of whoever compiled them: signal 11, no exception."""
    with pytest.raises(GrammarError) as raised:
        check_grammar(Grammar(kind=kind, text=text))
    assert message in str(raised.value)
    assert len(str(raised.value)) <= MAX_MESSAGE_CHARACTERS + len("...")


def test_a_grammar_that_takes_long_is_given_up() -> None:
    """2,800 bytes that mean 2^300 letters; the compiler's own limit may be faster than the clock."""
    with pytest.raises(GrammarError, match=r"more than 0\.5 s|too big"):
        check_grammar(Grammar(kind="lark", text=product(300)))


def test_a_busy_machine_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is out once; the same grammar is taken later."""
    grammar = Grammar(kind="regex", text="busy+")
    monkeypatch.setattr(check_module, "CHECK_WALL_SECONDS", 0.001)
    with pytest.raises(CheckUnavailableError, match="not compiled within"):
        check_grammar(grammar)
    monkeypatch.undo()
    check_grammar(grammar)


def _ends_itself(tmp_path: Path, code: str) -> str:
    """A Python that runs `code` in place of the check."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, signal\n{code}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    "code",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "raise SystemExit(1)",
        "",
    ],
    ids=["killed", "terminated", "failed", "silent"],
)
def test_a_check_that_ends_without_a_verdict_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    """Killed for memory, or unable to import: it was called too large a grammar, and stayed that."""
    grammar = Grammar(kind="regex", text=f"{tmp_path.name}+")
    monkeypatch.setattr(sys, "executable", _ends_itself(tmp_path, code))
    with pytest.raises(CheckUnavailableError):
        check_grammar(grammar)
    monkeypatch.undo()
    check_grammar(grammar)


def test_a_check_that_cannot_be_started_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No descriptors or no processes left: the OSError was a 500."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(CheckUnavailableError, match="can't be started"):
        check_grammar(Grammar(kind="regex", text="unstarted"))


@pytest.mark.parametrize("error", [MemoryError(), BaseException("panic")], ids=["memory", "panic"])
def test_a_compiler_that_breaks_is_a_refusal_not_a_consent(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | MemoryError
) -> None:
    """What a thread raised was lost, and nothing was said against the grammar."""

    def broken(grammar: Grammar) -> list[str]:
        raise error

    monkeypatch.setattr(check_module, "_problems", broken)
    assert "too large" in check_module._verdict(Grammar(kind="regex", text="a"))


def test_checking_needs_no_torch() -> None:
    code = "import sys, model.grammar; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
