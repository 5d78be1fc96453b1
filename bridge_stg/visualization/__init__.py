"""Pictures of a grounding: annotated video, picture strip, HTML report."""

from .overlay import annotate_video
from .report import ReportEntry, write_report
from .strip import draw_strip

__all__ = ["ReportEntry", "annotate_video", "draw_strip", "write_report"]
