"""Backends: the few primitive ops that everything in ``lowrank`` is made of.

``reference`` (plain torch) is complete; a fast backend implements the same functions and is tested against it.
"""
