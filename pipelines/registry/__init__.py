"""The registered model and the gate that chooses the champion."""
