"""The search over training settings with Ray Tune."""
