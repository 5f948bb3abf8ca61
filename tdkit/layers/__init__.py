"""What layers a model has, what they are made of, and what stands in for them."""
