"""The distributed sweep over sampler settings."""
