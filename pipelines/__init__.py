"""Data pipeline around the diffusion library: one module per DVC stage; the folders beside them do the work."""
