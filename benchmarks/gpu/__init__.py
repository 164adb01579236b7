"""A whole model on a GPU, without a download: what an image costs does not depend on what the weights are."""
