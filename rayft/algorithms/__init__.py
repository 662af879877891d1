"""One algorithm, one file: its settings, its loss, its credit."""
