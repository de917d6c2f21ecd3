"""Benchmarks against real peers, each in the same run and at stated accuracy. ``make bench`` runs the suite."""
