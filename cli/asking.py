"""What `speed chat` and `speed complete` have in common: whom they ask, and how an answer is drawn."""

import argparse
from typing import Any

# Names of options and of the fields that they become, with the type; the server says what it takes.
FIELDS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens of an answer at most"),
    "temperature": (float, "0 for the likeliest tokens alone; default: the model's"),
    "top_p": (float, "share of the likeliest tokens that are drawn from; default: the model's"),
    "seed": (int, "the same seed, prompt and options give the same text"),
    "num_loops": (int, "loops of the model; default: its own"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--url", help="a server that runs, with OpenAI's API; its key is read from OPENAI_API_KEY"
    )
    parser.add_argument(
        "--model",
        help="with --url a name there (default: the first one); else a folder or a Hugging Face id, loaded "
        "for this command alone (default: the embedded model)",
    )
    for name, (kind, text) in FIELDS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar=name.upper(), help=text)
    parser.add_argument(
        "--no-speculation", action="store_true", help="decode plainly; the text is the same, and slower"
    )


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that the options ask for. Others than ours are sent only if they are given."""
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    return fields | ({"speculation": False} if args.no_speculation else {})
