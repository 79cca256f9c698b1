"""Whether a chat template wants the content of a message as one text or as a list of parts.

Decided by the template's syntax tree, as vLLM does: a template that loops over a message's content wants
parts, since a loop over a text would show it letter by letter or not at all. Knows nothing about messages.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from jinja2 import nodes

ContentFormat = Literal["string", "openai"]


class ContentUse(NamedTuple):
    """What a template does with contents: loops over them; asks whether they are texts."""

    loops: bool
    asks_for_strings: bool


def content_use(tree: nodes.Template) -> ContentUse:
    """How the template behind `tree` uses the content of its messages."""
    names = _Names(tree)
    loops = any(names.is_content(loop.iter) for loop in tree.find_all(nodes.For))
    asks = any(test.name == "string" and names.is_content(test.node) for test in tree.find_all(nodes.Test))
    return ContentUse(loops, asks)


class _Names:
    """Which variables of a template hold messages, or a list of them, and which hold a content.

    Scopes are not told apart: a name that holds a content anywhere counts everywhere.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._messages = {"messages"}
        self._contents: set[str] = set()
        bindings = list(_bindings(tree))
        size = -1
        while size != (size := len(self._messages) + len(self._contents)):
            for name, value in bindings:
                if self.is_content(value):
                    self._contents.add(name)
                elif self._is_message(value):
                    self._messages.add(name)

    def is_content(self, value: nodes.Node) -> bool:
        """Whether the expression is a message's content, perhaps filtered or a part of it."""
        if isinstance(value, nodes.Name):
            return value.name in self._contents
        if _attribute(value) == "content" and self._is_message(_owner(value)):
            return True
        return any(map(self.is_content, _sources(value)))

    def _is_message(self, value: nodes.Node) -> bool:
        if isinstance(value, nodes.Name):
            return value.name in self._messages
        return any(map(self._is_message, _sources(value)))


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """Every name with every expression that it may stand for."""
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name):
            yield loop.target.name, loop.iter
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            arguments = macros[call.node.name].args
            yield from ((name.name, value) for name, value in zip(arguments, call.args, strict=False))
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _attribute(value: nodes.Node) -> str | None:
    """The name in `owner.name` or `owner['name']`; None for everything else, such as `owner[0]`."""
    if isinstance(value, nodes.Getattr):
        return value.attr
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const):
        return value.arg.value if isinstance(value.arg.value, str) else None
    return None


def _owner(value: nodes.Node) -> nodes.Node:
    assert isinstance(value, nodes.Getattr | nodes.Getitem)
    return value.node


def _sources(value: nodes.Node) -> list[nodes.Node]:
    """The expressions whose value an expression may be, or an entry of; not `owner` for `owner.name`."""
    if isinstance(value, nodes.Getitem) and _attribute(value) is None:
        return [value.node]
    if isinstance(value, nodes.Filter) and value.node is not None:
        return [value.node]
    if isinstance(value, nodes.CondExpr):
        return [value.expr1, *([] if value.expr2 is None else [value.expr2])]
    return [value.left, value.right] if isinstance(value, nodes.Or | nodes.And | nodes.Add) else []
