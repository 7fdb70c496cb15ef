"""Architectures of published checkpoints that no library provides."""
