"""The sweep over sampler settings: its rows, pictures and figures."""
