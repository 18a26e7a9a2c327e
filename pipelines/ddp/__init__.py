"""Training on Ray Train: the parts of the train stage."""
