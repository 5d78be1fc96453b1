"""Data: samples, video decoding, frame sampling and the synthetic benchmark. Knows no model."""

from .frame_sampling import sample_spatial_frames, uniform_frame_index
from .sample import Box, GroundingSample, SentenceType, Task, read_samples, write_samples
from .scene import COLORS, COMPOSITIONS, IMAGE_TIER, MOTIONS, SHAPES, SPLITS, TIERS, VOCABULARY, SceneObject
from .synthetic import SyntheticClip, SyntheticImages, SyntheticTubes, write_split
from .video import VideoInfo, decode_frames, frames, probe
from .video_writer import write_video

__all__ = [
    "COLORS",
    "COMPOSITIONS",
    "IMAGE_TIER",
    "MOTIONS",
    "SHAPES",
    "SPLITS",
    "TIERS",
    "VOCABULARY",
    "Box",
    "GroundingSample",
    "SceneObject",
    "SentenceType",
    "SyntheticClip",
    "SyntheticImages",
    "SyntheticTubes",
    "Task",
    "VideoInfo",
    "decode_frames",
    "frames",
    "probe",
    "read_samples",
    "sample_spatial_frames",
    "uniform_frame_index",
    "write_samples",
    "write_split",
    "write_video",
]
