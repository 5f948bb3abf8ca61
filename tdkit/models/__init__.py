"""Architectures that can be named instead of a file."""
