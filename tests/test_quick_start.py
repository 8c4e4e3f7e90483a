"""The quick start in JupyterLab, as a reader uses it: run all cells, then work with the dashboard."""

import re

import nbformat
import pytest

from tests.test_browser import KERNEL

COUNTER = ".bn-levels [data-level='inner'] .bn-count"


def number(text):
    "The first number in `text`, thousands separators left out"
    return int(re.search(r"[\d,]+", text).group().replace(",", ""))


@pytest.mark.parametrize("lab", ["perCommTarget", "disabled"], indirect=True)
def test_quick_start(open_notebook, lab):
    tab = open_notebook("tutorials/quick_start").run_all()
    assert tab.errors() == []
    tab.command("application:toggle-left-area")
    tab.show(".bn-dashboard")
    tab.wait_text(".bn-status", "iteration 2,000")
    tab.screenshot("quick_start_curves")

    before = tab.text(COUNTER)
    tab.click(".bn-step")
    assert number(tab.wait_change(COUNTER, before)) == number(before) + 1
    tab.page.locator(".bn-levels [data-level='inner']").first.click()
    tab.wait_text(".bn-step-level", "step inner")
    tab.click(".bn-step-level")
    tab.wait_text(COUNTER, f"{number(before) + 2}")
    tab.click(".bn-back")
    tab.wait_text(COUNTER, f"{number(before) + 1}")
    tab.click(".bn-until")
    tab.wait_text(".bn-status", "next: take the hypergradient of outer")

    panel(tab, "Hypergradient")
    tab.page.locator(".bn-inspector").wait_for()
    tab.screenshot("quick_start_hypergradient")
    panel(tab, "Sets")
    tab.wait_text(".bn-dashboard", "takes")
    tab.screenshot("quick_start_sets")
    panel(tab, "Methods")
    tab.click(".bn-compare")
    tab.wait_text(".bn-comparison", "exact")
    tab.page.locator(".bn-results .bn-plot svg").wait_for()
    tab.screenshot("quick_start_methods")

    tab.click(".bn-run")  # the iterations are used up: a sentence, and the controls live on
    tab.wait_text(".bn-error", "All 2000 iterations are done")
    tab.click(".bn-step")
    tab.page.wait_for_function("() => document.querySelector('.bn-error').textContent.trim() === ''")
    for cell in range(0, 30, 4):
        tab.page.locator(".jp-Cell").nth(cell).evaluate("e => e.scrollIntoView({block: 'start'})")
        tab.screenshot(f"quick_start_page_{cell:02}")


def panel(tab, title):
    "Open a panel of the dashboard"
    tab.click(f".bn-dashboard .lm-TabBar-tab:has-text('{title}')")


PROGRAM = """
import time
from betty_nb import Config, Debugger, EngineConfig, debug
from betty_nb.app.demo import breast_cancer_program
import torch
torch.set_num_threads(1)

def program():
    "The program of the quick start, without an end"
    return breast_cancer_program(Config(type='cg', cg_iterations=10, unroll_steps=20), EngineConfig(train_iters=10**7, strategy='cpu'))

def rate(engine, run, seconds=1.5):
    "Iterations a second of wall time and of the kernel's processor time (that of all its threads) during `run`"
    before, wall, processor = engine.completed, time.perf_counter(), time.process_time()
    run(seconds)
    done = engine.completed - before
    return done / (time.perf_counter() - wall), done / (time.process_time() - processor)

bare = program()
def run_bare(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end: bare.run(20)

shown = Debugger(program())
def run_shown(seconds):
    shown.run()
    time.sleep(seconds)
    shown.pause()
"""

MEASURE = """
for attempt in range(3):  # other work on the machine may disturb one of them
    pairs = [(rate(bare, run_bare, 0.5), rate(shown.engine, run_shown, 0.5)) for _ in range(20)]
    best = [[max(pair[side][i] for pair in pairs) for side in range(2)] for i in range(2)]  # other work only ever slows a side down
    wall, processor = (shown_ / bare_ for bare_, shown_ in best)
    if processor >= 0.90: break
print(f'share {processor:.3f} in processor time, {wall:.3f} in wall time, of {best[0][0]:.0f} iterations a second')
"""


@pytest.mark.alone
def test_throughput_with_the_dashboard_open(open_notebook):
    cells = [nbformat.v4.new_code_cell(text) for text in (PROGRAM, "debug(shown.engine)", MEASURE)]
    tab = open_notebook(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)).run_all()
    assert tab.errors() == []
    measured = tab.page.locator(".jp-OutputArea-output", has_text="share").last.inner_text()
    print(f"\nwith the dashboard open in JupyterLab: {measured.strip()}")
    processor = float(re.search(r"([\d.]+) in processor time", measured)[1])
    assert processor >= 0.90, measured  # where other work shares the cores, wall time says little
