"""Measurement of a model: labels, samples, features, statistics. Trials, the sweep and the gate use it."""
