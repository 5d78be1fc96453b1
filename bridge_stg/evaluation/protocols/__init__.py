"""Metric protocols of public evaluators, by name: the same predictions, each scored as its authors' code does."""

from ..metrics import EVERY_FRAME, MetricProtocol
from .hcstvg_official import HCSTVG_OFFICIAL
from .ptd import PTD
from .report import protocol_report, score_files
from .stcat import STCAT
from .tubedetr import TUBEDETR

PROTOCOLS: dict[str, MetricProtocol] = {
    protocol.name: protocol for protocol in (EVERY_FRAME, TUBEDETR, STCAT, HCSTVG_OFFICIAL, PTD)
}

__all__ = [
    "EVERY_FRAME",
    "HCSTVG_OFFICIAL",
    "PROTOCOLS",
    "PTD",
    "STCAT",
    "TUBEDETR",
    "MetricProtocol",
    "protocol_report",
    "score_files",
]
