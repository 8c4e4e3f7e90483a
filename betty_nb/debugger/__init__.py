"""The headless debugger: records, timeline, controller."""
from .controller import Debugger
from .records import Comparison, HypergradientRecord, LevelState, Moved, ProgramState, Record, SetsRecord, Swapped, Table
