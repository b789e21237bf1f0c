"""Benchmarks: two things compared in one run, with machine, versions and settings."""
