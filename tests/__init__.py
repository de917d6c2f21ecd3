"""Tests of flexlora_fast: they mirror the package, and hold every operation to its float64 twin."""
