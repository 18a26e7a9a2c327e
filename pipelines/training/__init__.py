"""The training itself, shared by the train stage and the search: loop, checkpoints, settings, model."""
