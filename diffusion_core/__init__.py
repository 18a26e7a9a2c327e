"""The diffusion library: schedules, objectives, networks, samplers and metrics in plain PyTorch.

Nothing here imports Ray, MLflow, DVC or ``pipelines``: a user can take this package alone.
"""
