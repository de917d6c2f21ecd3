"""The engine inside frameworks that move adapters between machines; each needs its own extra."""
