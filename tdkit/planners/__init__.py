"""Choosing among candidates; planners see records, never tensors."""
