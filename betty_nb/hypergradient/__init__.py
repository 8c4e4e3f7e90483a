"""Hypergradient methods, their registry, and the reverse sweep through a program."""
from .cg import CG
from .darts import Darts
from .exact import Exact
from .fixed_point import FixedPoint
from .identity import Identity
from .method import METHODS, Linearization, LinearSolve, Method, Solve, make_method, option, register, undisturbed
from .minres import GMRes, MinRes
from .neumann import Neumann
from .normal_cg import NormalCG
from .nystrom import Nystrom
from .penalty import Penalty
from .resolve import Resolved, resolve
from .sama import Sama
from .sweep import Hypergradient, hypergradient, path_shares
from .unroll import ForwardMode, Unroll
from .zeroth_order import Evolution, Reinforce
