"""The dashboard and its live pictures: thin shells over a Debugger."""
from .choices import Menu, RowTable
from .dashboard import Dashboard
from .live import Curves, LevelGraph
