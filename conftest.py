"""Which modules pytest may import for their doctests: those of frameworks that are not installed raise."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("flwr") else ["flexlora_fast/integrations/flower"]
