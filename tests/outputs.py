"""`python -m tests.outputs [notebook ...]`: run notebooks (all of them by default) and keep their outputs, so that they can be read without a kernel.

A live widget is kept as the static picture that comes with it."""

import sys
from pathlib import Path

import nbclient
import nbformat

from tests.repo import child_env, name, notebooks

WIDGET = "application/vnd.jupyter.widget-view+json"


def static(nb):
    "The notebook without live widgets, warnings on stderr, and the metadata of the run"
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            live = [o for o in cell.outputs if WIDGET in o.get("data", {}) and "text/html" not in o["data"]]  # a progress bar, say
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and o not in live]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output["data"].pop(WIDGET, None)
                    output["data"]["text/plain"] = output["data"].get("text/plain", "")[:2000]
    nb.metadata.pop("widgets", None)
    nb.metadata = {"kernelspec": nb.metadata["kernelspec"]}
    return nb


def main(paths):
    for path in paths or notebooks():
        nb = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            nb, timeout=600, kernel_name="python3", store_widget_state=False, resources={"metadata": {"path": Path(path).parent}}
        )
        client.execute(env=child_env())
        nbformat.write(static(nb), path)
        print(name(Path(path)))


if __name__ == "__main__":
    main([Path(p).resolve() for p in sys.argv[1:]])
