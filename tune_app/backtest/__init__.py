"""Recorded curves replayed through policies and whole search strategies; synthetic curves."""
