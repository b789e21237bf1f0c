"""Trains the bundled model from icon sets, and teaches any diffusers checkpoint a style by LoRA."""
