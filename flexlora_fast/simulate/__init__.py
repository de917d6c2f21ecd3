"""Federated runs on one machine, from one file: ``flexlora-fast simulate``. Needs the extra ``simulate``."""
