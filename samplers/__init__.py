"""Sampling: sigma grids, solver tables, the scan over denoising steps, and the pipeline to a video file."""
