"""The prepare stage's own parts: sources of images, splits, decoding, and the data set that they make."""
