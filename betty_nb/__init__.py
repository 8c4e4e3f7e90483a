"""An interactive toolkit for multilevel optimization in PyTorch: declare the levels, run them, and look inside."""
from .configs import Config, EngineConfig
from .engine import Engine
from .envs import Env
from .graph import Graph, GraphError, GraphWarning
from .hypergradient import CG, Darts, Exact, LinearSolve, Method, Solve, register
from .problems import HigherIterativeProblem, ImplicitProblem, IterativeProblem, Problem

__version__ = "0.1.0"


def __getattr__(name):
    if name in ("Debugger", "check_hypergradient", "combinations"):  # loaded when they are first asked for
        from . import debugger

        return getattr(debugger, name)
    if name == "tensorboard":
        from .app.tensorboard import tensorboard

        return tensorboard
    raise AttributeError(f"module 'betty_nb' has no attribute {name!r}")


def debug(engine):
    "The dashboard of a live Engine in a notebook; in a script its state is printed and the headless Debugger returned"
    from .widgets.debug import debug

    return debug(engine)
