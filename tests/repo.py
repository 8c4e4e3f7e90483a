"Where the repository's files are: shared by the notebook runner, the guards and the README exporter."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {
    ".git",
    ".venv",
    "venv",
    "build",
    "dist",
    "_proc",
    "_docs",
    "runs",
    "__pycache__",
    ".ipynb_checkpoints",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
}


def files(root=ROOT):
    "Every file of the working tree that git would keep, tracked or not; without git, all but caches and environments."
    if (root / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True
        )
        if listed.returncode == 0:
            return sorted(root / f for f in set(listed.stdout.split("\0")) if f and (root / f).is_file())
    found = []
    for folder, subs, names in os.walk(root):
        subs[:] = [s for s in subs if s not in LEFT_OUT and not s.endswith(".egg-info")]
        found += [Path(folder) / n for n in names if not n.endswith((".pyc", ".html", ".pt"))]
    return sorted(found)


def copy_tree(to, root=ROOT):
    "Copy the working tree's files to the folder `to`."
    for f in files(root):
        target = to / f.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(f, target)
    return to


def notebooks(root=ROOT):
    return [f for f in files(root) if f.suffix == ".ipynb" and (root / "nbs") in f.parents]


def modules(root=ROOT):
    return [f for f in files(root) if f.suffix == ".py" and (root / "betty_nb") in f.parents]


def name(notebook, root=ROOT):
    return notebook.relative_to(root / "nbs").with_suffix("").as_posix()


def read(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def tool(command):
    return str(Path(sys.executable).with_name(command))  # a console script of the environment the tests run in


def directives(cell):
    "The `#|` lines of a code cell, each as its words: `#| eval: false` -> ['eval:', 'false']."
    if cell["cell_type"] != "code":
        return []
    return [line.split() for line in re.findall(r"^\s*#\s*\|(.*)$", source(cell), re.M) if line.split()]


def child_env(**extra):
    "The environment of a process that runs a notebook: one thread, no window, this working tree's betty_nb."
    path = os.pathsep.join(p for p in [str(ROOT), os.environ.get("PYTHONPATH")] if p)
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **extra}
