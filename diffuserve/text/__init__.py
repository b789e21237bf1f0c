"""A prompt on its way to the UNet: weights and breaks, tokens in chunks, embeddings."""
