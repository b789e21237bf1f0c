"""A checkpoint: where it comes from, what its files say, its weights in PyTorch modules."""
