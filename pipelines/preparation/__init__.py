"""Parts of the prepare stage: sources of images, splits, decoding, and the writing of the data set."""
