"""Models that the examples train and quantize."""
