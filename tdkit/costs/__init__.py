"""What a budget bounds."""
