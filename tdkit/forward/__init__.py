"""Run anybody's model and leave no trace."""
