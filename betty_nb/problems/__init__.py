"""The levels of a program."""
from .iterative import HigherIterativeProblem, IterativeProblem
from .problem import ImplicitProblem, Problem
