"""Steering a chain while it is sampled, without training the model."""
