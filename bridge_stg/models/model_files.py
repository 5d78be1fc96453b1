"""Reading and writing the files of saved models and processors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError
from ..files import ensure_writable_folder
from ..json_text import parse_json

PROCESSOR_FILE = "processor_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_PREFIXES = ("processor", "tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: the file is missing, or holds no JSON object.
    """
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} cannot be read: it holds no JSON object.")
    return values


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an error as one line without a full stop, cut after `longest` characters."""
    text = str(error).encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    return text if len(text) <= longest else text[:longest] + "..."


def save_whole(save: Callable[[str], Any], folder: str | os.PathLike[str]) -> list[str]:
    """Let `save` write files into a temporary folder, then rename each into `folder`, processor_config.json last.

    A folder that holds processor_config.json therefore holds the other files, and all of them whole.

    Returns:
        The paths written.

    Raises:
        OutputError: `folder` cannot be written, or the disk is full.
    """
    target = ensure_writable_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=".processor-") as stage:
            save(stage)
            written = [path for path in Path(stage).rglob("*") if path.is_file()]
            written.sort(key=lambda path: (path.name == PROCESSOR_FILE, path))
            for path in written:
                _sync(path)
            saved = [target / path.relative_to(stage) for path in written]
            for path, place in zip(written, saved, strict=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    except OutputError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions where a disk is full
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OutputError(f"The processor cannot be written to {target}: {reason}.") from error
    return [str(path) for path in saved]


def unreadable(name_or_folder: str | os.PathLike[str], error: Exception) -> ModelError:
    """The error for a processor that could not be loaded; if a file of it is torn, it names the file."""
    folder = Path(name_or_folder)
    if not folder.exists():
        return ModelError(
            f"{name_or_folder} is neither a folder nor a checkpoint with a processor that can be loaded: "
            f"{one_line(error)}."
        )
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if path.name.startswith(_PREFIXES):
            try:
                read_json(path)
            except ModelError as unread:
                return unread
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return ModelError(f"{folder} is incomplete: it has no {_TOKENIZER_FILES[0]}.")
    return ModelError(f"The processor in {name_or_folder} cannot be loaded: {one_line(error)}.")


def check_template(folder: str | os.PathLike[str]) -> None:
    """Raise ModelError if the chat template of a folder was cut off."""
    from jinja2 import Environment, TemplateSyntaxError

    path = Path(folder) / _TEMPLATE_FILE
    if not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        torn = None if text.strip() else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        torn = one_line(error)
    except (
        TemplateSyntaxError
    ) as error:  # tags that transformers adds are unknown to jinja, so only a missing end shows a torn file
        torn = one_line(error) if "nexpected end" in str(error) else None
    if torn is not None:
        raise ModelError(f"{path} cannot be read, as if it had been cut off: {torn}.")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
