"""The toy's mixture in numbers: four corners of a square, unequally likely, all equally wide."""

CENTRES = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
WEIGHTS = (0.1, 0.2, 0.4, 0.3)
SPREAD = 0.5
