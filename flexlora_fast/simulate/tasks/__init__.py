"""Tasks by name. A new one is a subclass of ``base.Task`` in a file of its own, listed here."""

from __future__ import annotations

import importlib
from typing import Any

from flexlora_fast.errors import OptionError
from flexlora_fast.simulate.tasks.base import Task

# Name: module and class, imported when it is asked for.
TASKS: dict[str, str] = {
    "trec": "trec:Trec",
    "banking77": "banking77:Banking77",
    "newsgroups": "newsgroups:Newsgroups",
    "cifar100": "cifar100:Cifar100",
    "domainnet": "domainnet:DomainNet",
    "natural-instructions": "natural_instructions:NaturalInstructions",
    "gsm8k": "gsm8k:Gsm8k",
    "commonsense": "commonsense:Commonsense",
    "telequad": "telequad:TeleQuad",
    "reasoning-gym": "reasoning:ReasoningGym",
}


def task_class(name: str) -> type[Task]:
    """The class of that name. Raises ``OptionError`` for one that is not there."""
    if name not in TASKS:
        raise OptionError(f"task {name!r} is not one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found


def make(name: str, options: dict[str, Any]) -> Task:
    """The task with its options, as an experiment's ``[task]`` table has them. Raises what pydantic does."""
    cls = task_class(name)
    return cls(cls.Options(**options))
