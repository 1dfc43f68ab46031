"""Question-answering tasks, mixtures of them, and the user's own data. Imports no torch."""

from graphlora.tasks.catalog import TASKS, load_choices, load_examples
from graphlora.tasks.example import Example, TextExample
from graphlora.tasks.mixture import Mixture, load_mixture
from graphlora.tasks.task import Task

__all__ = [
    "TASKS",
    "Example",
    "Mixture",
    "Task",
    "TextExample",
    "load_choices",
    "load_examples",
    "load_mixture",
]
