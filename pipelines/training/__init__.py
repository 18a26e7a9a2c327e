"""The training loop, its checkpoints and its Ray Train driver."""
