"""A mixture of Gaussians in the plane: everything about it is known, so it can hold the engine to account."""
