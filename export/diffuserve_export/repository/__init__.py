"""What servers load: a Triton model repository, or a model archive for TorchServe."""
