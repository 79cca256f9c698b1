"""What a user can mend is told in one line: the ending that all commands of training share."""

import argparse
import sys
from collections.abc import Callable

Action = Callable[[argparse.Namespace], int]
USAGE_ERROR = 2  # exit status


def reporting(prog: str, run: Action) -> Action:
    """Wraps an action so that wrong paths and values end it with one line on stderr and exit status 2."""

    def reported(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (OSError, ValueError, TypeError) as error:
            print(f"{prog}: error: {error}", file=sys.stderr)
            return USAGE_ERROR

    return reported
