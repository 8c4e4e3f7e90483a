"""The dashboard in JupyterLab: every control used by a test that reads what appears, how long that takes, what it costs, and what stays behind."""

import gc
import re
import statistics
import threading
import time

import nbformat
import pytest

from betty_nb.widgets.dashboard import Dashboard
from tests.test_browser import KERNEL

PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
from betty_nb import Config, Debugger, EngineConfig, debug
from betty_nb.app.demo import breast_cancer_program
debugger = Debugger(breast_cancer_program(Config(type="cg", cg_iterations=3, unroll_steps=20), EngineConfig(train_iters=10**7, strategy="cpu")))
debugger.step(60)
dashboard = debug(debugger)
dashboard
"""
# What a person sees: the time from a click to the picture in which the text of an element is another one.
SEEN = """([button, seen, pattern]) => new Promise((done, fail) => {
  const find = () => document.querySelector(seen)?.innerHTML ?? '', before = find(), begin = performance.now()
  const look = () => {
    const now = find()
    if (pattern ? new RegExp(pattern).test(now) : now !== before) requestAnimationFrame(() => done(performance.now() - begin))
    else if (performance.now() - begin > 20000) fail(new Error(`nothing happened in ${seen}: ${now.slice(0, 200)}`))
    else requestAnimationFrame(look)
  }
  document.querySelector(button).dispatchEvent(new MouseEvent('click', { bubbles: true })); look()
})"""
STATUS, TAB = ".bn-status", ".bn-dashboard .lm-TabBar-tab:has-text('{}')"


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells], metadata=KERNEL)


def opened(open_notebook, *more):
    "A tab that shows the dashboard of the program"
    return shown(open_notebook, PROGRAM, *more)


def shown(open_notebook, *cells):
    "A tab that has run these cells and shows the dashboard"
    tab = open_notebook(notebook(*cells)).run_all()
    assert tab.errors() == []
    tab.command("application:toggle-left-area")
    tab.show(".bn-dashboard")
    tab.wait_text(STATUS, "next:")
    return tab


def panel(tab, title):
    tab.click(TAB.format(title))


def seen(tab, button, element=STATUS, pattern=""):
    "Milliseconds from a click to its result on the screen"
    return tab.page.evaluate(SEEN, [button, element, pattern])


def action(tab):
    "How many actions the timeline says have been done"
    return int(tab.page.locator(".bn-handle").first.get_attribute("aria-valuenow"))


def wait_action(tab, n):
    tab.page.wait_for_function("n => document.querySelector('.bn-handle').getAttribute('aria-valuenow') == n", arg=str(n))


def steps(tab, level):
    return int(re.search(r"\d+", tab.text(f".bn-levels [data-level='{level}'] .bn-count"))[0])


SETTLED = """pausing => new Promise((done, fail) => {
  const root = document.querySelector('.bn-dashboard'), begin = performance.now(), free = b => !b.disabled && !b.classList.contains('bn-locked')
  let last = begin, paused = begin
  const changes = new MutationObserver(() => { last = performance.now() })
  changes.observe(root, { subtree: true, childList: true, attributes: true, characterData: true })
  const look = () => {
    const now = performance.now(), status = root.querySelector('.bn-status').textContent
    const ready = !status.includes('…') && ['.bn-step', '.bn-until'].every(s => free(root.querySelector(s)))
    if (pausing && !ready && now - paused > 500) { paused = now; root.querySelector('.bn-pause').click() }
    if (ready && now - last > 250 || now - begin > 60000) { changes.disconnect(); ready ? done() : fail(new Error(`never settled: ${status}`)) } else setTimeout(look, 25)
  }
  look()
})"""


def settled(tab, pausing=False):
    "Wait until nothing is being done and every part of the dashboard has said so: its parts are painted one after the other"
    tab.page.evaluate(SETTLED, pausing)


@pytest.mark.parametrize("lab", ["perCommTarget", "disabled"], indirect=True)
def test_every_control(open_notebook, lab):
    tab = opened(open_notebook)
    tab.screenshot("dashboard_curves")
    # the levels
    tab.page.locator(".bn-levels [data-level='inner']").click()
    tab.wait_text(".bn-step-level", "step inner")
    tab.wait_text(".bn-level-facts", "31")
    assert "in U" in tab.text(".bn-levels [data-level='outer']")
    # moving
    before, at = steps(tab, "inner"), action(tab)
    seen(tab, ".bn-step")
    tab.wait_text(".bn-levels [data-level='inner'] .bn-count", str(before + 1))
    settled(tab)
    tab.click(".bn-step-level")
    tab.wait_text(".bn-levels [data-level='inner'] .bn-count", str(before + 2))
    tab.page.wait_for_selector(".bn-mark[data-kind='by hand']:not(.bn-sample)")
    settled(tab)
    tab.click(".bn-back")
    tab.wait_text(".bn-levels [data-level='inner'] .bn-count", str(before + 1))
    settled(tab)
    tab.click(".bn-replay")
    tab.wait_text(".bn-levels [data-level='inner'] .bn-count", str(before + 2))
    settled(tab)
    tab.click(".bn-unroll")
    tab.page.wait_for_function("() => / (20|40|60|80) steps|(20|40|60|80) of 20|0 of 20/.test(document.querySelector('.bn-level-facts').textContent)")
    settled(tab)
    then = action(tab)
    tab.click(".bn-until")
    tab.page.wait_for_function("n => document.querySelector('.bn-handle').getAttribute('aria-valuenow') > n", arg=then)
    tab.wait_text(STATUS, "next: take the hypergradient of outer")
    settled(tab)
    # the timeline, by key and by mouse
    now = action(tab)
    handle = tab.page.locator(".bn-handle").first
    handle.focus()
    for _ in range(3):
        handle.press("ArrowLeft")
    wait_action(tab, now - 3)
    tab.page.locator(".bn-handle").first.press("Enter")
    tab.wait_text(".bn-timeline", f"action {now - 3:,}")
    settled(tab)
    box = tab.page.locator(".bn-timeline").first.bounding_box()
    tab.page.mouse.move(*middle(tab.page.locator(".bn-handle").first.bounding_box()))
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 32, steps=4)
    tab.wait_text(".bn-timeline", "back to action")
    tab.page.mouse.up()
    tab.page.wait_for_function("n => +document.querySelector('.bn-handle').getAttribute('aria-valuenow') < n", arg=at)
    settled(tab)
    # a fork, and going on with one branch
    tab.page.locator(".bn-other select").select_option("darts")
    tab.click(".bn-fork")
    tab.page.wait_for_selector(".bn-curves path.bn-curve[data-name='outer · darts']")
    assert tab.page.locator(".bn-take").count() == 2
    tab.screenshot("dashboard_fork")
    tab.click(".bn-take >> nth=1")
    tab.page.wait_for_selector(".bn-take", state="detached")
    tab.wait_text(".bn-level-facts", "darts")
    settled(tab)
    # breakpoints
    tab.page.locator(".bn-kind").select_option("hypergradient norm")
    tab.page.locator(".bn-value").fill("1e-9")
    tab.click(".bn-add")
    tab.wait_text(".bn-breakpoint", "hypergradient norm")
    tab.click(".bn-run")
    tab.wait_text(".bn-breakpoint", "stopped here")
    tab.wait_text(STATUS, "Breakpoint 1")
    settled(tab)
    tab.page.locator(".bn-breakpoint input").uncheck()
    settled(tab)
    tab.click(".bn-run")
    tab.wait_text(STATUS, "running")
    tab.click(".bn-pause")
    tab.wait_text(STATUS, "next:")
    settled(tab)
    tab.click(".bn-drop")
    tab.page.wait_for_selector(".bn-breakpoint", state="detached")
    assert tab.errors() == []


def middle(box):
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_every_panel(open_notebook):
    tab = opened(open_notebook)
    panel(tab, "Hypergradient")
    tab.wait_text(".bn-inspector", "solver residual")
    tab.wait_text(".bn-said", "error")
    assert tab.page.locator(".bn-parameters tr").count() == 2 and tab.page.locator(".bn-histogram").count() == 1
    tab.click(".bn-path-after")  # one path, each of its edges with the norm of the vector on it
    tab.wait_text(".bn-path-said", "path 1 of 1: outer → inner → outer")
    assert tab.page.locator("text.bn-norm").count() == 2
    tab.screenshot("dashboard_hypergradient")
    tab.page.locator(".bn-against input").uncheck()
    tab.wait_text(".bn-said", "not compared")
    settled(tab)
    tab.click(".bn-look")
    settled(tab)
    panel(tab, "Sets")
    tab.wait_text(".bn-sets", "declared")
    assert "inner" in tab.text(".bn-sets table") and tab.page.locator(".bn-sets .bn-bad").count() == 0
    tab.screenshot("dashboard_sets")
    panel(tab, "Methods")
    menu = tab.page.locator(".bn-menu select").nth(1)
    menu.locator("option:disabled").first.wait_for(state="attached")
    assert "not here:" in menu.locator("option:disabled").first.text_content()
    menu.select_option("darts")
    tab.page.wait_for_selector(".bn-option-alpha")
    tab.click(".bn-swap")
    tab.wait_text(".bn-said >> nth=1", "darts")
    settled(tab)
    tab.page.locator(".bn-compiled input").check()
    tab.wait_text(".bn-said >> nth=1", "inner: not compiled -> compiled")
    settled(tab)
    tab.screenshot("dashboard_compiled")
    tab.page.locator(".bn-compiled input").uncheck()
    tab.wait_text(".bn-said >> nth=1", "inner: compiled -> not compiled")
    settled(tab)
    tab.page.locator(".bn-option-alpha input").fill("a lot")
    tab.click(".bn-swap")
    tab.wait_text(".bn-error", "alpha must be a number, not 'a lot'.")
    settled(tab)
    tab.click(".bn-compare")
    tab.page.wait_for_selector(".bn-comparison tbody tr", timeout=90_000)
    assert tab.page.locator(".bn-error").first.inner_text().strip() == ""
    assert tab.page.locator(".bn-comparison tbody tr").count() > 8 and tab.page.locator(".bn-results .bn-plot svg").count() == 1
    settled(tab)
    tab.screenshot("dashboard_methods")
    tab.page.locator(".bn-comparison tr", has_text="exact").get_by_role("button").click()
    tab.page.wait_for_selector(".bn-comparison tr.bn-current:has-text('exact')")
    settled(tab)
    panel(tab, "Doctor")
    tab.page.wait_for_selector(".bn-diagnosis p", timeout=60_000)
    settled(tab)
    tab.screenshot("dashboard_doctor")
    panel(tab, "Curves")
    tab.click(".bn-choice .bn-button >> nth=0")
    tab.wait_text(".bn-curves", "log scale")
    assert tab.page.evaluate("() => document.querySelector('.bn-dashboard').getBoundingClientRect().height") < 600, "fits a window of 720 pixels"
    assert tab.errors() == []


ILL = """
from betty_nb import CG
engine = breast_cancer_program(Config(type="neumann", neumann_iterations=20, neumann_alpha=5.0, unroll_steps=20), EngineConfig(train_iters=10**6, strategy="cpu"))
ill = Debugger(engine)
ill.step_level("inner", 200)
shown = debug(ill)
shown.tabs.selected_index = 4
shown
"""


def test_the_doctor_and_his_remedy(open_notebook):
    tab = open_notebook(notebook(PROGRAM.replace("\ndashboard\n", "\n"), ILL)).run_all()
    assert tab.errors() == []
    tab.page.wait_for_selector(".bn-finding-item", timeout=60_000)
    tab.show(".bn-dashboard")
    assert re.search(r"Doctor • \d", tab.text(TAB.format("Doctor")))
    assert "What to do" in tab.text(".bn-finding-detail") and tab.page.locator(".bn-finding-detail svg").count() >= 1
    tab.screenshot("dashboard_ill")
    item = tab.page.locator(".bn-finding-item", has_text="✖").first
    item.focus()
    item.press("ArrowDown")
    item.press("ArrowUp")
    for i in range(tab.page.locator(".bn-finding-item").count()):
        tab.page.locator(".bn-finding-item").nth(i).click()
        if tab.page.locator(".bn-apply").count():
            tab.click(".bn-apply")
            break
    tab.wait_text(".bn-diagnosis", "from the next action on")
    settled(tab)
    found = tab.page.locator(".bn-finding-item").count()
    tab.click(".bn-examine")
    tab.page.wait_for_function("n => document.querySelectorAll('.bn-finding-item').length < n", arg=found, timeout=60_000)


def rest(tab, seconds=60):
    "Pause until nothing goes on any more: clicks that the kernel has not seen yet may still start something"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        settled(tab, pausing=True)
        now = action(tab)
        time.sleep(1)
        if action(tab) == now and "next:" in tab.text(STATUS):
            return settled(tab)
    pytest.fail(f"the program never came to rest: {tab.text(STATUS)}")


def test_clicks_while_busy_twice_out_of_order_and_after_an_interrupt(open_notebook):
    tab = opened(open_notebook)
    before = action(tab)
    storm = "for (const b of ['.bn-step', '.bn-step', '.bn-pause', '.bn-back', '.bn-run', '.bn-run', '.bn-pause', '.bn-step', '.bn-until', '.bn-pause']) document.querySelector(b).click()"
    for _ in range(5):
        tab.page.evaluate(f"() => {{ {storm} }}")
        time.sleep(0.2)
        tab.command("kernelmenu:interrupt")
        tab.page.evaluate(f"() => {{ {storm} }}")
        time.sleep(0.2)
    rest(tab)
    assert action(tab) >= before - 1
    inner = steps(tab, "inner")
    then = action(tab)
    tab.click(".bn-step-level")  # nothing is stuck
    wait_action(tab, then + 1)
    tab.page.locator(".bn-levels [data-level='inner']").click()
    tab.wait_text(".bn-step-level", "step inner")
    settled(tab)
    inner = steps(tab, "inner")
    tab.click(".bn-step-level")
    tab.wait_text(".bn-levels [data-level='inner'] .bn-count", str(inner + 1))
    assert tab.text(".bn-error").strip() == ""


def without_browser():
    "The Debugger of the program and a Dashboard of it that nobody sees"
    space = {}
    exec(PROGRAM.removesuffix("dashboard = debug(debugger)\ndashboard\n"), space)
    return space["debugger"], Dashboard(space["debugger"])


def test_the_hypergradient_shown_is_that_of_the_moment_or_says_of_which():
    debugger, dashboard = without_browser()
    inspector = dashboard.hypergradient

    def shown(panel):
        dashboard.tabs.selected_index = panel
        dashboard.refresh()
        dashboard.idle(60)
        return inspector.record, inspector.look.description

    debugger.step_level("inner")
    one, words = shown(1)
    shown(0)
    debugger.back()
    debugger.step_level("outer")  # as many actions, but other ones
    other, _ = shown(1)
    assert words == "look now" and other is not one
    inspector.quick = 0
    at = debugger.state.index
    debugger.step()
    assert shown(1) == (other, f"look again (this is action {at})")
    inspector.take()
    record, words = shown(1)
    assert record is not other and words == "look now"
    dashboard.close()


def test_what_is_being_written_into_an_option_stays_until_another_method_is_shown():
    debugger, dashboard = without_browser()
    panel = dashboard.methods
    dashboard.tabs.selected_index = dashboard.panels.index(panel)

    def painted():
        dashboard.refresh()
        dashboard.idle(60)
        return panel.options.children[0]

    painted().value = 7
    panel.seen = None  # as after compiled code was switched on or off
    assert painted().value == 7
    debugger.swap("inner", "cg", iterations=5)
    assert painted().value == 5
    debugger.swap("inner", "darts")
    assert painted().value == "0.01"
    dashboard.close()


@pytest.mark.alone
def test_clicks_are_answered_at_once(open_notebook):
    tab = opened(open_notebook)
    panel(tab, "Hypergradient")
    tab.wait_text(".bn-inspector", "solver residual")
    settled(tab)
    for attempt in range(3):  # other work on the machine may disturb one of them
        median = answers(tab)
        print(f"\nfrom a click to what it does, seen in JupyterLab: {', '.join(f'{k} {v:.0f} ms' for k, v in median.items())}")
        if median["pause"] < 200 and max(median.values()) < 300:
            return
    pytest.fail(f"pause should be seen within 200 ms and every other click within 300 ms, but: {median}")


def answers(tab, n=7):
    "The median of the milliseconds from a click to its result, for each of a few clicks"
    waits = {"pause": [], "step": [], "back": [], "hypergradient": [], "level": []}
    for i in range(n):
        panel(tab, "Curves")
        seen(tab, ".bn-run", STATUS, "running")
        time.sleep(0.5)
        waits["pause"].append(seen(tab, ".bn-pause", STATUS, "next:"))
        settled(tab)
        tab.click(".bn-until")
        tab.wait_text(STATUS, "next: take the hypergradient of outer")
        settled(tab)
        waits["step"].append(seen(tab, ".bn-step", STATUS, "next: descend outer"))
        settled(tab)
        waits["back"].append(seen(tab, ".bn-back", STATUS, "next: take the hypergradient"))
        settled(tab)
        waits["level"].append(seen(tab, f".bn-levels [data-level='{'inner' if i % 2 == 0 else 'outer'}']", ".bn-step-level"))
        settled(tab)
        panel(tab, "Hypergradient")
        settled(tab)
        time.sleep(0.5)
        waits["hypergradient"].append(seen(tab, ".bn-step-level", ".bn-said"))
        settled(tab)
    return {name: statistics.median(times) for name, times in waits.items()}


CHURN = """
def churn(refreshes):
    for i in range(refreshes):
        if i % 20 == 0: debugger.step()
        if i % 20 == 10: debugger.back()
        dashboard.tabs.selected_index = i % 3
        dashboard.refresh()
        if i % 20 == 0: dashboard.idle(60)
    dashboard.tabs.selected_index = 0
    dashboard.idle(60)
"""


def test_2000_refreshes_leave_nothing_in_the_browser(open_notebook):
    tab = open_notebook(notebook(PROGRAM, CHURN, "churn(100)", "churn(2000)"))
    for i in range(3):
        tab.run_cell(i)
    client = tab.page.context.new_cdp_session(tab.page)
    client.send("Performance.enable")

    def browser():
        time.sleep(2)
        for _ in range(2):
            client.send("HeapProfiler.collectGarbage")
        found = {m["name"]: m["value"] for m in client.send("Performance.getMetrics")["metrics"]}
        return found["JSHeapUsedSize"] / 2**20, found["Nodes"]

    heap, nodes = browser()
    tab.run_cell(3)
    heap2, nodes2 = browser()
    assert tab.errors() == []
    print(f"\nafter 2,000 refreshes: heap of the browser {heap:.1f} -> {heap2:.1f} MB, nodes {nodes:.0f} -> {nodes2:.0f}")
    assert heap2 - heap < 5 and nodes2 - nodes < 1000


def test_2000_refreshes_and_200_dashboards_leave_nothing_in_the_kernel():
    import ipywidgets as W

    space = {}
    exec(PROGRAM.replace("dashboard = debug(debugger)\ndashboard\n", "") + "\nfrom betty_nb.widgets.dashboard import Dashboard\ndashboard = Dashboard(debugger)\n" + CHURN, space)

    def open_and_close(n):
        for i in range(n):
            other = space["Dashboard"](space["debugger"])
            other.tabs.selected_index = i % 3
            other.refresh()
            other.idle(60)
            other.close()

    def census():
        gc.collect()
        return dict(threads=threading.active_count(), widgets=len(W.Widget.widgets), objects=len(gc.get_objects()))

    space["churn"](100)
    open_and_close(10)
    before = census()
    space["churn"](2000)
    open_and_close(200)
    after = census()
    space["dashboard"].close()
    grown = {k: after[k] - before[k] for k in before}
    print(f"\nafter 2,000 refreshes and 200 dashboards opened and closed: {grown}")
    assert grown["threads"] <= 0 and grown["widgets"] == 0 and grown["objects"] < 1000, grown


STATIC = """
from pathlib import Path
from betty_nb.views.report import report_html
dashboard.hypergradient.take()
dashboard.idle(60)
bundle = dashboard._repr_mimebundle_()
picture = (bundle if isinstance(bundle, dict) else bundle[0])["text/html"]
from betty_nb.views.tables import Html
_ = Path("static.html").write_text(report_html("A dashboard", [("Now", Html(picture))]), encoding="utf-8")
"""


def test_the_static_picture_needs_no_kernel(open_notebook):
    tab = open_notebook(notebook(PROGRAM, STATIC)).run_all()
    assert tab.errors() == []
    page = tab.page.context.new_page()
    page.goto((tab.root / "static.html").as_uri())
    assert page.locator("svg.bn-graph g.bn-node").count() == 2, "the graph"
    curve = page.locator("svg.bn-figure path.bn-curve").first
    assert curve.bounding_box()["width"] > 200, "the curves"
    assert page.locator("table.bn-table tr", has_text="inner").count() >= 1 and page.locator("table.bn-parameters").count() == 1, "the tables"
    page.screenshot(path=tab.shots / "dashboard_static.png", full_page=True)
    page.close()
