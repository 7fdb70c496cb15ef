"""The network wing, the only rooms that know torch: models, images, taps, extraction."""
