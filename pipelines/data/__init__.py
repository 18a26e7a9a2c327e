"""Sources of images, their preparation into shards, and how shards are read."""
