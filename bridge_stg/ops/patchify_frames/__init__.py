"""`patchify_frames` and `patchify_videos`."""
