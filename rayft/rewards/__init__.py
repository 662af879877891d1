"""Scoring in parallel: Ray actors that decode events and call the user's reward."""
