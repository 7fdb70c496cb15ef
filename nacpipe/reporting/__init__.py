"""The HTML report, its figures, and mosaics of images."""
