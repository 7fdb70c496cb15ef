"""A detector to take away: its file, and the module that runs beside a classifier."""
