"""The diffusion library: schedules, objectives, networks, samplers and metrics in plain PyTorch.

It imports neither Ray, MLflow, DVC nor ``pipelines``, so that it can be used alone.
"""
