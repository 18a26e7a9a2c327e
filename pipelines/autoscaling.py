"""Node types of an autoscaling cluster: what it can hold, and not only what it holds now."""
