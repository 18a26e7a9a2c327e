"""Measures of sample quality: mergeable statistics, Fréchet and kernel distance, scores, feature extractors."""
