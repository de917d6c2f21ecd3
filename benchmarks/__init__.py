"""The benchmark suite: workloads, peers, and what the machine allows, measured in one run. ``make bench`` runs it."""
