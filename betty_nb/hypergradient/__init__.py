"""Hypergradient methods, their registry, and the reverse sweep through a program."""
from .cg import CG
from .darts import Darts
from .exact import Exact
from .method import METHODS, Linearization, LinearSolve, Method, Solve, make_method, option, register, undisturbed
from .minres import GMRes, MinRes
from .neumann import Neumann
from .normal_cg import NormalCG
from .nystrom import Nystrom
from .sama import Sama
from .sweep import Hypergradient, hypergradient, path_shares
from .unroll import ForwardMode, Unroll
