"""The prepared data set: shards, manifest and listing, read by every later stage."""
