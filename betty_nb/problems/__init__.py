"""The levels of a program."""
from .problem import ImplicitProblem, Problem
