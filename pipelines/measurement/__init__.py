"""Labels to samples to features to statistics: shared by trials, the sweep and the gate."""
