"""Shapes. Point clouds of any source, a diffusion model of them, rewards by class and by geometry, metrics, files."""
