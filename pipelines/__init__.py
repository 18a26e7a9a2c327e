"""What moves data through the diffusion library: one module a DVC stage, the work in the folders beside them."""
