"""diffuserve on NVIDIA Triton: the classes behind the models in triton_repo/, and the launcher."""
