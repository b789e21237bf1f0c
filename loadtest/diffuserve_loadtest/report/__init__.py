"""What a run comes to, and how it is shown."""
