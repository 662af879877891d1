"""Receptors that are shipped, and the script that prepares them."""
