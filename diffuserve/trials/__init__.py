"""Which engine a bundle runs on: each is tried on this machine, compared and timed."""
