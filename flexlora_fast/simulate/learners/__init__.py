"""Learners by the kind of corpus they learn from."""

from __future__ import annotations

import importlib

from flexlora_fast.simulate.corpus import Kind
from flexlora_fast.simulate.learners.base import Learner

LEARNERS: dict[Kind, str] = {
    "text": "text:TextLearner",
    "image": "image:ImageLearner",
    "generation": "generation:GenerationLearner",
}


def learner_class(kind: Kind) -> type[Learner]:
    """The learner of that kind."""
    module, _, attribute = LEARNERS[kind].partition(":")
    found: type[Learner] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found
