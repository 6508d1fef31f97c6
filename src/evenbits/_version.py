"""The one place that states the version (hatch reads it, checkpoints record it)."""

__version__ = "0.1.0"
