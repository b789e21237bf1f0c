"""Starting and stopping a server: what the launchers of Triton and TorchServe share, and `diffuserve serve`."""
