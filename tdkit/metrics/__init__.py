"""Approximation errors, each with its law."""
