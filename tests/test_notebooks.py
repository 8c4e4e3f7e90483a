"""Every notebook, from top to bottom, each in a fresh process.

A notebook that exports a module runs under nbdev's own runner; the others (tutorials, course, index) in a real Jupyter kernel, as a reader
would run them. Both run a copy in a temporary folder, so nothing they write lands in the repository."""

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.repo import child_env, directives, name, notebooks, read

TIMEOUT = 300  # seconds for a notebook
RUNNER = """
import sys
from pathlib import Path
from nbdev.test import test_nb
passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split())
print(f'{seconds:.1f} s')
sys.exit(not passed)
"""


@functools.cache
def cuda_missing():
    "Why cells flagged `#| cuda` cannot run here; empty where they can."
    import torch

    if torch.cuda.is_available():
        return ""
    return "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"


def flags_skipped(nb):
    "The flags of `nb` whose cells do not run here, each with the reason."
    asked = os.environ.get("BETTY_NB_FLAGS", "").replace(",", " ").split()
    used = {d[0] for cell in nb["cells"] for d in directives(cell)}
    skipped = {}
    if "slow" in used and "slow" not in asked:
        skipped["slow"] = "BETTY_NB_FLAGS=slow runs them"
    if "cuda" in used and "cuda" not in asked and cuda_missing():
        skipped["cuda"] = cuda_missing()
    return skipped


def run_nbdev(notebook, folder, skipped):
    "Run with nbdev's runner in a process of its own; the cell's traceback if it fails."
    copy = shutil.copy(notebook, folder)
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, str(copy), " ".join(skipped)],
            cwd=folder,
            env=child_env(),
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as e:
        return f"not done after {TIMEOUT} s\n{(e.stderr or b'').decode(errors='replace')}"
    return f"{done.stdout}\n{done.stderr}" if done.returncode else None


def run_kernel(notebook, folder, skipped):
    "Run in a Jupyter kernel of its own; the cell's traceback if it fails."
    import nbclient
    import nbformat

    nb = nbformat.read(notebook, as_version=4)
    left_out = lambda cell: any(d[0] in skipped or d == ["eval:", "false"] for d in directives(cell))
    nb.cells = [c for c in nb.cells if not left_out(c)]
    client = nbclient.NotebookClient(
        nb, timeout=TIMEOUT, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": str(folder)}}
    )
    environment = child_env(IPYTHONDIR=str(folder / ".ipython"))
    try:
        try:
            client.execute(env=environment)
        except RuntimeError as e:  # of two kernels that are started at one moment both may choose the same port, and one is never heard of
            if "Kernel didn't respond" not in str(e):
                raise
            client.execute(env=environment)
    except nbclient.exceptions.CellExecutionError as e:
        return str(e)
    except nbclient.exceptions.CellTimeoutError:
        return f"a cell was not done after {TIMEOUT} s"
    except nbclient.exceptions.DeadKernelError:
        return "the kernel died"


def parameter(notebook):
    "A benchmark that asserts how long something takes has the room for itself"
    timed = name(notebook).startswith(("benchmarks/10", "benchmarks/13", "benchmarks/14", "benchmarks/15"))
    return pytest.param(notebook, id=name(notebook), marks=[pytest.mark.alone] * timed)


@pytest.mark.parametrize("notebook", map(parameter, notebooks()))
def test_notebook(notebook, tmp_path):
    nb = read(notebook)
    skipped = flags_skipped(nb)
    for flag, reason in skipped.items():
        print(f"{name(notebook)}: cells flagged {flag} skipped, {reason}")
    exports = any(d[0] == "default_exp" for cell in nb["cells"] for d in directives(cell))
    error = (run_nbdev if exports else run_kernel)(notebook, tmp_path, skipped)
    if error:
        pytest.fail(f"{notebook.name} fails:\n" + re.sub(r"\x1b\[[\d;]*m", "", error), pytrace=False)
