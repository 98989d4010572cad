"""The sampler compiled at full size for accelerators that are not there; see README.md beside this file."""
