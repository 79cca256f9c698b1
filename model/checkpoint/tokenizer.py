"""The tokenizer.json of a model, made once by `transformers` where a checkpoint has an older form of it.

Imports neither torch nor transformers: the conversion runs in a process of its own, because the API process
needs the tokenizer and must stay small. Invariant: no code of a checkpoint is run, nothing is downloaded, and
what can't be converted is a TokenizerError of one line.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

from model.checkpoint.hub import read_file
from model.machine import cache_folder, child_environment

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
# Each older form, and the files that it needs.
OLDER_FORMS = (
    ("tokenizer.model",),  # SentencePiece
    ("spiece.model",),
    ("vocab.json", "merges.txt"),  # byte pairs, as GPT-2 has them
    ("vocab.txt",),  # WordPiece
)
# What else says how a text is cut: the class of the tokenizer, and tokens outside of its vocabulary.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONVERSION_SECONDS = 300.0
_refused: dict[str, str] = {}  # digest -> why: it is asked for several times, and each try takes seconds


class TokenizerError(ValueError):
    """An older form of a tokenizer that can't be converted; the message is one line that says why."""


def tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer.json of the model in `folder`; None for a model without a tokenizer.

    It is the folder's own, or one converted from an older form and kept in the cache folder, under a digest
    of all that it is made from. The first conversion takes some seconds. Raises TokenizerError and
    LfsPointerError.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return folder / TOKENIZER_FILE
    form = next((form for form in OLDER_FORMS if all((folder / name).is_file() for name in form)), None)
    if form is None:
        return None
    contents = {name: read_file(folder / name) for name in (*form, *BESIDE) if (folder / name).is_file()}
    digest = _digest(contents)
    kept = cache_folder() / "tokenizers" / digest / TOKENIZER_FILE
    if not kept.is_file():
        if digest in _refused:
            raise TokenizerError(_refused[digest])
        log.info("%s is converted to %s, once", " and ".join(form), kept)
        try:
            _convert(contents, kept)
        except TokenizerError as error:
            _refused[digest] = str(error)
            raise
    return kept


def _digest(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()[:24]


def _convert(contents: dict[str, bytes], result: Path) -> None:
    """Converts in another process, with the files alone: no config.json, whose model type may be unknown."""
    try:
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=result.parent) as work:
            for name, content in contents.items():
                Path(work, name).write_bytes(content)
            _run(Path(work), Path(work, "converted.json"))
            Path(work, "converted.json").replace(result)  # whole or not at all, if two processes convert
    except OSError as error:
        raise TokenizerError(f"{next(iter(contents))} can't be converted: {error}") from None


def _run(folder: Path, result: Path) -> None:
    command = [sys.executable, "-m", "model.checkpoint.convert_tokenizer", str(folder), str(result)]
    try:
        ended = subprocess.run(
            command,
            env=child_environment(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=CONVERSION_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TokenizerError(
            f"the tokenizer is not converted after {CONVERSION_SECONDS:.0f} seconds"
        ) from None
    if ended.returncode:
        said = (ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1]
        raise TokenizerError(f"the tokenizer can't be converted: {said}")
