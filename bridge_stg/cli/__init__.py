"""The command line: a file a command, and what they share."""

from .main import app, main

__all__ = ["app", "main"]
