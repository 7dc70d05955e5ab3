"""Measurements whose commands the documentation names."""
