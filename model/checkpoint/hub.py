"""Where a model comes from: a folder of this machine, or an id of the Hugging Face hub.

Imports no torch, since the API process, which reads the tokenizer, resolves the model too. Downloads and
their cache are huggingface_hub's, with its environment (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT).
Invariant: only configuration, tokenizer and the safetensors files that the loader reads are fetched;
nothing is executed or unpickled, and whatever fails is one `HubError` of one line.
"""

import json
import re
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    INDEX_FILE,
)
# How a file begins that git put there in the place of one that git-lfs has not fetched yet.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class LfsPointerError(ValueError):
    """A file that is only Git LFS's pointer to itself; the message is one line that names it."""


class HubError(ValueError):
    """A model that is neither a folder here nor to be had from the hub; the message is one line."""


def is_hub_id(model: str) -> bool:
    """Whether `model` means an id ORG/NAME: it has that form, and no folder of that name is here."""
    return _ID.fullmatch(model) is not None and not Path(model).is_dir()


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model, downloaded first (a progress bar on stderr) if `model` is an id ORG/NAME.

    `revision` is a branch, a tag or a commit of the hub; None is its main branch. Raises HubError.
    """
    if is_hub_id(model):
        return _download(model, revision)
    if revision is not None:
        raise HubError(f"a revision ({revision!r}) belongs to an id ORG/NAME, not to the folder {model!r}")
    if not model or not Path(model).is_dir():
        raise HubError(f"there is no folder {model!r}; a model is a folder or a Hugging Face id ORG/NAME")
    return Path(model)


def read_file(path: Path) -> bytes:
    """The content of a checkpoint's small file; raises OSError, or LfsPointerError (a ValueError)."""
    refuse_lfs_pointer(path)
    return path.read_bytes()


def refuse_lfs_pointer(path: Path) -> None:
    """Raises LfsPointerError for a file that git-lfs has not fetched, OSError for one that can't be read."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise LfsPointerError(
                f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"
            )


def _download(model: str, revision: str | None) -> Path:
    """The small files first; then the weights that they name, of the same commit."""
    folder = _snapshot(model, revision, list(SMALL_FILES))
    if not (folder / "config.json").is_file():
        raise HubError(f"{model!r} has no config.json: it is not a model that can be served")
    names = _shards(model, folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else [SINGLE_FILE]
    folder = _snapshot(model, folder.name, [*SMALL_FILES, *names])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing == [SINGLE_FILE]:
        raise HubError(
            f"{model!r} has no safetensors weights; other formats (pickles such as pytorch_model.bin can "
            "run code) are never loaded"
        )
    if missing:
        raise HubError(f"{model!r}: its {INDEX_FILE} names {', '.join(missing)}, which can't be had")
    return folder


def _shards(model: str, index: Path) -> list[str]:
    """The files that an index names; the loader checks the rest of it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise HubError(f"{model!r}: its {INDEX_FILE} is not readable") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise HubError(f"{model!r}: its {INDEX_FILE} names {name!r}, which is no safetensors file")
    return names


def _snapshot(model: str, revision: str | None, names: list[str]) -> Path:
    # Here: it takes 0.3 s to import, and a local folder needs none of it.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        # Patterns match whole paths, and * crosses slashes: nothing in a subfolder is wanted.
        return Path(snapshot_download(model, revision=revision, allow_patterns=names, ignore_patterns="*/*"))
    except Exception as error:  # the HTTP client below, and so its errors, differ between versions
        raise HubError(_reason(model, revision, error)) from error


def _reason(model: str, revision: str | None, error: Exception) -> str:
    """What went wrong in one line, with what the user can do about it."""
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(model, error)
    known: list[tuple[Any, str]] = [  # the first that fits: a gated one is "not found" too
        (errors.GatedRepoError, f"{model!r} is gated: accept its terms on its page and set HF_TOKEN"),
        (
            errors.RepositoryNotFoundError,
            f"there is no folder {model!r}, and the hub shows no model of that name (a private one needs "
            "HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, f"{model!r} has no revision {revision!r}"),
        (errors.HFValidationError, f"{model!r} is not a valid id ORG/NAME"),
    ]
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    text = str(error).strip().partition("\n")[0]
    return f"{model!r} could not be downloaded: {type(error).__name__}: {text}"


def _unreachable(model: str, error: Exception) -> str:
    from huggingface_hub import constants  # noqa: PLC0415

    lacking = f"{model!r} is not, or not all of it, in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return f"{lacking}, and HF_HUB_OFFLINE forbids to download it"
    why = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
    return f"{lacking}, and the hub can't be reached{why}"
