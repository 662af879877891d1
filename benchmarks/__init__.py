"""Side-by-side measurements: ``python -m benchmarks.NAME [--quick]``. Not part of the wheel."""
