"""A grid of engines, measured alike, in one table."""
