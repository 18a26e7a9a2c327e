"""Measures of sample quality: mergeable statistics, Fréchet and kernel distances, scores, feature extractors."""
