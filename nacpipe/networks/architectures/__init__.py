"""Architectures that published checkpoints need and no library has."""
