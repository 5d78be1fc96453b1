"""Errors a user can cause. Each message is one sentence with the value and the rule; the CLI prints it as is."""

from __future__ import annotations

import os


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


def printable(path: str | os.PathLike[str]) -> str:
    """A file name as a message shows it: on one line, and text also where its bytes are not."""
    name = os.fspath(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
