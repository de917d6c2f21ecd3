"""A complete Flower app, and ``python -m examples.flower``, which starts it on this machine."""
