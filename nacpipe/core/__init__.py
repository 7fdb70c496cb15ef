"""The pure floor: no file, no clock, no print, no global random state."""
