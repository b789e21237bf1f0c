"""The server under test, seen from outside."""
