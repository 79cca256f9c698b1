"""`python -m model.checkpoint.convert_tokenizer FOLDER RESULT`: an older tokenizer as a tokenizer.json.

The folder holds a tokenizer's files alone. What they mean is for `transformers` to say; a class that only the
checkpoint's own code has is refused, since that code is never run.
"""

import json
import sys
from pathlib import Path

# What the files mean where tokenizer_config.json names no class.
DEFAULT_CLASSES = {"vocab.json": "GPT2Tokenizer", "vocab.txt": "BertTokenizer"}


def convert(folder: Path) -> str:
    """The content of tokenizer.json; raises ValueError, and what transformers raises for damaged files."""
    import transformers  # noqa: PLC0415, it takes seconds

    config = _config(folder)
    default = next((name for file, name in DEFAULT_CLASSES.items() if (folder / file).is_file()), None)
    kind = transformers.AutoTokenizer
    if default is not None and not config.get("tokenizer_class"):
        kind = getattr(transformers, default)
    tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} of transformers has no form as a tokenizer.json")
    text: str = backend.to_str()
    return text


def _config(folder: Path) -> dict[str, object]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"tokenizer_config.json must hold an object, not {type(found).__name__}")
    return found


def main() -> int:
    """Writes RESULT; says on stderr, in one line, what stands against it."""
    folder, result = map(Path, sys.argv[1:])
    try:
        text = convert(folder)
    except Exception as error:  # transformers and tokenizers raise no narrower class
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    result.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
