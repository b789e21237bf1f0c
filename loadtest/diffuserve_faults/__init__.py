"""Attacks on a real server, and what has to hold after each."""
