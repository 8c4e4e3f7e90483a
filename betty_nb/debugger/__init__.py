"""The headless debugger: records, timeline, controller."""
from .breakpoints import BreakpointHit, BreakpointRecord, BreakpointsRecord
from .check import CheckRecord, check_hypergradient
from .combinations import combinations
from .controller import Debugger
from .fork import Branch, Curve, ForkRecord
from .records import Comparison, HypergradientRecord, LevelState, Moved, ProgramState, Record, SetsRecord, Swapped, Table, TimelineRecord
from .tensorboard import TensorBoardRecord
