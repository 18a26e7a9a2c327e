"""The search over training settings: proposals, successive halving, and its trials on Ray Tune."""
