"""The load test: a workload is sent to a server, which is watched meanwhile, and reported on."""
