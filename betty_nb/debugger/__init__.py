"""The headless debugger: records, timeline, controller."""
from .check import CheckRecord, check_hypergradient
from .combinations import combinations
from .controller import Debugger
from .records import Comparison, HypergradientRecord, LevelState, Moved, ProgramState, Record, SetsRecord, Swapped, Table
