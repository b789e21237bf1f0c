"""Which requests, and when."""
