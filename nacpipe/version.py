"""The version, which caches, studies and detectors name."""

__version__ = "0.1.0"
