"""Image datasets from generative models: every requested image exists exactly once and belongs to exactly one row."""

__version__ = "0.1.0"
