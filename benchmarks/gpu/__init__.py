"""The GPU gate: build, tests, memory check and benchmarks on one GPU in one run. ``make gpu`` runs it."""
