"""Data: samples, video decoding, frame sampling and the synthetic benchmark. Nothing here knows a model."""

from .checking import CheckReport, check_dataset
from .clip import Clip, load_clip
from .frame_sampling import sample_spatial_frames, uniform_frame_index
from .mixture import MixtureSampler
from .readers import Dataset, Problem, iterate_dataset, read_dataset
from .sample import Box, GroundingSample, SentenceType, Task, read_samples, write_samples
from .sample_store import SampleStore
from .scene import COLORS, COMPOSITIONS, IMAGE_TIER, MOTIONS, SHAPES, SPLITS, TIERS, VOCABULARY, SceneObject
from .synthetic import SyntheticClip, SyntheticImages, SyntheticTubes, write_split
from .time_base import align_to_video
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
    "CheckReport",
    "Clip",
    "Dataset",
    "GroundingSample",
    "MixtureSampler",
    "Problem",
    "SampleStore",
    "SceneObject",
    "SentenceType",
    "SyntheticClip",
    "SyntheticImages",
    "SyntheticTubes",
    "Task",
    "VideoInfo",
    "align_to_video",
    "check_dataset",
    "decode_frames",
    "frames",
    "iterate_dataset",
    "load_clip",
    "probe",
    "read_dataset",
    "read_samples",
    "sample_spatial_frames",
    "uniform_frame_index",
    "write_samples",
    "write_split",
    "write_video",
]
