"""The in-flight batch: what runs together, in which order, and who is let in."""
