"""The worlds: one folder per domain. They know no Ray."""
