"""diffuserve on TorchServe: the launcher. The handler is in handlers/, the archive is written by export/."""
