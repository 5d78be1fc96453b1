"""Errors a user can cause. Each message is one sentence with the value and the rule; the CLI prints it as is."""

from __future__ import annotations

import logging
import os
import unicodedata

logger = logging.getLogger(__name__)
_BIDIRECTIONAL = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class BridgeSTGError(Exception):
    """Base of every error that is the user's to fix; the command line turns it into exit code 1."""


class VideoError(BridgeSTGError):
    """A video or image is missing, not a file, damaged, too large, or cannot be decoded for any other reason."""


class SampleError(BridgeSTGError):
    """An annotation record or a sentence breaks the schema."""


class ModelError(BridgeSTGError):
    """A model folder is missing, incomplete or of another kind."""


class OutputError(BridgeSTGError):
    """A result cannot be written where it was asked for."""


class ConfigError(BridgeSTGError):
    """A training or model configuration has an unknown key or a value out of range."""


def printable(text: str | os.PathLike[str], *, lines: bool = False) -> str:
    """Escape control signs and lone surrogates, so that a terminal shows a text or a file name and does not obey it.

    Args:
        lines: keep line breaks and tabs.
    """
    return "".join(
        sign.encode("unicode_escape").decode("ascii") if _is_control(sign) and not (lines and sign in "\n\t") else sign
        for sign in os.fspath(text)
    )


def _is_control(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or ord(sign) in _BIDIRECTIONAL


def reason_of(error: Exception, item: str) -> str:
    """Return why an item failed, in one line. An unexpected error is named by its type, and logged at DEBUG in full.

    Raises:
        the error itself, if it is not about the item: results cannot be written, or the device failed.
    """
    import torch  # this file is imported by commands that need no torch

    if isinstance(error, (OutputError, torch.AcceleratorError)):
        raise error
    if isinstance(error, BridgeSTGError):
        return str(error)
    logger.debug("%s failed", item, exc_info=error)
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"the memory is not enough for it. {line}".strip()
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
