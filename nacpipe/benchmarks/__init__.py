"""The images of a benchmark and where they are. This package needs no torch and decodes no image."""
