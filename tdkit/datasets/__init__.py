"""Data sets: named splits that yield standardised batches of images."""
