"""Adds the arguments of a command only when it is asked for, since those of some take seconds to import."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from server.command import UsageError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMPLETION = "--print-completion"


def fill(
    parser: argparse.ArgumentParser,
    name: Sequence[str],
    given: Sequence[str],
    add_arguments: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Calls `add_arguments` if the words of the command line `given` begin with `name`.

    A script that completes options needs those of every command, but for the commands that only a checkout
    has. Raises UsageError for one of these that is asked for and isn't there.
    """
    words = [word for word in given if not word.startswith("-")]
    if words[: len(name)] == list(name):
        add_arguments(parser)
    elif COMPLETION in given:
        with suppress(UsageError):
            add_arguments(parser)
