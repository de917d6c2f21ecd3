"""The frameworks' own servers and clients, started on this machine: ``make test-integrations``."""
