"""Training from scratch, fine-tuning and measuring."""
