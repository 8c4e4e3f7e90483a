"Fixtures, and how the tests share the machine: two workers, of which one waits while a test measures time."

import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests.browser import chrome, lab, open_notebook  # noqa: F401  fixtures

try:
    import fcntl
except ImportError:  # not on Windows: there tests that measure time are disturbed by the others
    fcntl = None


@pytest.fixture
def one_thread():
    "For tests with tiny tensors, where more threads would only wait for each other"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)  # before the workers read the groups
def pytest_collection_modifyitems(items):
    "Tests in the browser stay with one worker, which starts JupyterLab once, and come first, since they take longest"
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("browser"))
    items.sort(key=lambda item: "lab" not in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "A test marked `alone` has the room for itself; the others share it. Who waits stands at the door, so that nobody else enters meanwhile."
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None or fcntl is None:
        return (yield)
    folder = Path(tempfile.gettempdir())
    with open(folder / f"betty_nb-{run}-door", "w") as door, open(folder / f"betty_nb-{run}-room", "w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:  # closing the file is not enough: a process that the test has forked, as a DataLoader does, may still hold it open
            fcntl.flock(room, fcntl.LOCK_UN)


def pytest_terminal_summary(terminalreporter):
    "What was asked for and the test that proves it, where tests/test_wanted.py took part in the run"
    reports = [
        (outcome, report) for outcome in ("passed", "skipped", "failed", "error") for report in terminalreporter.stats.get(outcome, ())
    ]
    outcomes = {report.nodeid.partition("@")[0]: outcome for outcome, report in reports if hasattr(report, "nodeid")}
    if any("test_wanted.py::" in nodeid for nodeid in outcomes):
        from tests.test_wanted import table

        terminalreporter.section("what was asked for, and the tests that prove it")
        for line in table(outcomes):
            terminalreporter.write_line(line)
