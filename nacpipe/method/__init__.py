"""Neuron activation coverage itself: pure functions of arrays. No file, no clock, no print, no global random state."""
