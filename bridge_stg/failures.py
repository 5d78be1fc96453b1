"""One item of many that fails is listed with its reason, and never ends a run."""

from __future__ import annotations

import logging

import torch

from .errors import BridgeSTGError, OutputError

logger = logging.getLogger(__name__)


def reason_of(error: Exception, item: str) -> str:
    """Why an item failed, in one line. What nobody expected is given with its type, and logged at DEBUG in full.

    Raises:
        the error itself, where it is not about the item: results cannot be written, or the device failed.
    """
    if isinstance(error, (OutputError, torch.AcceleratorError)):
        raise error
    if isinstance(error, BridgeSTGError):
        return str(error)
    logger.debug("%s failed", item, exc_info=error)
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"the memory is not enough for it. {line}".strip()
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
