"""Which method trains the better model: grids of simulated runs, and tables of what came out."""
