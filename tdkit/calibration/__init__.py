"""What unlabelled inputs say about a model."""
