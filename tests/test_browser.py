"What only a real browser can show."

import pytest
from nbformat.v4 import new_code_cell, new_notebook

BUTTON = """
import ipywidgets
button, label, clicks = ipywidgets.Button(description='click'), ipywidgets.Label('clicked 0 times'), []
def clicked(_):
    clicks.append(1)
    label.value = f'clicked {len(clicks)} times'
button.on_click(clicked)
button.add_class('t-button')
label.add_class('t-label')
ipywidgets.VBox([button, label])
"""
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


# JupyterLab sends widget messages to another thread of the kernel, or not: handlers must work either way.
@pytest.mark.parametrize("lab", ["perCommTarget", "disabled"], indirect=True)
def test_a_button_reaches_the_kernel(open_notebook):
    tab = open_notebook(new_notebook(cells=[new_code_cell(BUTTON), new_code_cell("print('ran to the end')")], metadata=KERNEL)).run_all()
    assert tab.errors() == []
    tab.wait_text(".jp-Notebook", "ran to the end")
    tab.wait_text(".t-label", "clicked 0 times")
    for n in (1, 2):
        tab.click(".t-button")
        tab.wait_text(".t-label", f"clicked {n} times")
    assert tab.screenshot("button").stat().st_size > 5000
