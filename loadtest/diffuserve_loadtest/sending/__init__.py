"""The load generator: sends a workload's requests, checks the answers and records them."""
