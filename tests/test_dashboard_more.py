"""More of the dashboard in JupyterLab: the keyboard, contrast, two of them side by side, a red mismatch, TensorBoard."""

import re
import time

from tests.test_dashboard import notebook as made
from tests.test_dashboard import panel, settled, shown

# Two levels of matrices, so that there are heat maps; the timeline has a mark of each kind, a breakpoint has stopped the program, and the doctor finds something.
MARKED = """
import warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
from betty_nb import Config, Debugger, Engine, EngineConfig, ImplicitProblem, debug

class Inner(ImplicitProblem):
    def training_step(self, batch):
        own = self.module.weight
        return (own.square() * self.outer.module.weight.exp()).sum() + 4 * (own - 1).square().sum()

class Outer(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner.module.weight - 0.5).square().sum()

def level(cls, name, config, lr):
    net = torch.nn.Linear(12, 6, bias=False)
    return cls(name, config, net, torch.optim.SGD(net.parameters(), lr=lr), train_data_loader=[0])

diverging = Config(type="neumann", neumann_alpha=0.25, neumann_iterations=8, unroll_steps=3)
both = {"u2l": {"outer": ["inner"]}, "l2u": {"inner": ["outer"]}}
engine = Engine([level(Outer, "outer", None, 1e-4), level(Inner, "inner", diverging, 0.02)], EngineConfig(train_iters=10**6, strategy="cpu"), both)
debugger = Debugger(engine)
debugger.step(20)
debugger.step_level("inner", 2)
debugger.swap("inner", "darts")
debugger.step(2)
debugger.swap("inner", "neumann", alpha=0.25, iterations=8)
with torch.no_grad():
    engine.inner.module.weight.add_(0.1)
debugger.step(3)
debugger.fork({"inner": "cg"}, steps=5)
debugger.break_on("hypergradient norm", above=1e-9)
debugger.step(20)
debugger.step(4)
debugger.back(2)
dashboard = debug(debugger)
dashboard
"""

# The contrast of every text and mark inside an element with what it stands on, worst first. A mark is seen where its fill or its outline is.
CONTRAST = """(root) => {
  const parse = c => { const m = c.match(/[\\d.]+/g); return m && c !== 'none' && !c.startsWith('url') ? [+m[0], +m[1], +m[2], m.length > 3 ? +m[3] : 1] : null }
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
  const lum = c => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]) }
  const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => p - q); return (y + .05) / (x + .05) }
  const chain = e => { const out = []; for (; e; e = e.parentElement) out.push(e); return out }
  const paper = e => chain(e).reverse().reduce((back, x) => { const c = parse(getComputedStyle(x).backgroundColor); return c ? over(c, back) : back }, [255, 255, 255, 1])
  const faded = e => chain(e).reduce((o, x) => o * getComputedStyle(x).opacity, 1)
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 && chain(e).every(x => { const s = getComputedStyle(x); return s.visibility !== 'hidden' && s.display !== 'none' }) }
  const name = e => `${e.tagName}.${e.getAttribute('class') ?? ''} "${(e.textContent || '').trim().slice(0, 30)}" in ${chain(e).map(x => [...x.classList].find(c => c.startsWith('bn-'))).filter(Boolean).slice(0, 4).join(' < ')}`
  const found = new Map()
  const note = (kind, e, colour, extra = 1) => {
    const c = parse(colour); if (!c || !c[3]) return
    const back = paper(e), r = ratio(over([c[0], c[1], c[2], c[3] * extra * faded(e)], back), back), key = `${kind} ${[...e.classList].join('.')} ${e.dataset?.kind ?? ''} ${colour}`
    if (!found.has(key) || found.get(key).r > r) found.set(key, { kind, r: +r.toFixed(2), what: name(e), colour })
  }
  for (const e of root.querySelectorAll('*')) {
    if (!seen(e) || e.closest('[disabled],[aria-hidden=true],title,style,option:disabled,.bn-locked')) continue
    const s = getComputedStyle(e), own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
    if (e instanceof SVGElement) {
      if (['text', 'tspan'].includes(e.tagName) && own) note('text', e, s.fill, +s.fillOpacity)
      else if (['path', 'line', 'circle', 'rect', 'polyline'].includes(e.tagName) && !e.matches('.bn-grid,.bn-plain,rect.bn-box,rect.bn-norm,.bn-pill rect')) { 
        const f = parse(s.fill), b = f && s.fill !== 'none' ? 1 : 0
        const both = [b ? [s.fill, +s.fillOpacity] : null, s.stroke !== 'none' && parseFloat(s.strokeWidth) > 0 ? [s.stroke, +s.strokeOpacity] : null].filter(Boolean)
        if (both.length) { // a mark is seen where its fill or its outline is
          const back = paper(e), best = both.map(([c, o]) => { const p = parse(c); return [ratio(over([p[0], p[1], p[2], p[3] * o * faded(e)], back), back), c, o] }).sort((x, y) => y[0] - x[0])[0]
          note('mark', e, best[1], best[2]) } }
    } else if (own || ['INPUT', 'SELECT'].includes(e.tagName)) note('text', e, s.color)
    if (e.matches('.bn-finding-item')) note('mark', e, s.borderLeftColor)
    if (e.matches('.bn-bar1')) note('mark', e, s.borderTopColor)
  }
  return [...found.values()].sort((a, b) => a.r - b.r)
}"""

# What has the focus: its part of the dashboard, itself, and how its focus is seen, as (width of the ring in pixels, its contrast).
FOCUS = """() => {
  const e = document.activeElement, parts = { levels: '.bn-levels', tabs: '.lm-TabBar', panel: '.widget-tab-contents', timeline: '.bn-timeline', breakpoints: '.bn-breakpoints' }
  const part = !e.closest('.bn-dashboard') ? 'outside' : Object.keys(parts).find(k => e.closest(parts[k])) ?? 'controls'
  const marked = [e, e.parentElement, e.parentElement?.parentElement].find(x => x && [...x.classList].some(c => c.startsWith('bn-') && c !== 'bn-button')), own = e.dataset.level ?? e.dataset.key
  const name = own ?? [...(marked?.classList ?? [])].find(c => c.startsWith('bn-') && c !== 'bn-button' && c !== 'bn-locked')?.slice(3) ?? e.textContent.trim()
  const s = getComputedStyle(e), box = e instanceof SVGElement && getComputedStyle(e.querySelector('rect.bn-box') ?? e.querySelector('rect'))
  const [wide, colour] = box ? [parseFloat(box.strokeWidth), box.stroke] : s.outlineStyle === 'none' ? [0, 'rgb(0,0,0)'] : [parseFloat(s.outlineWidth), s.outlineColor]
  const numbers = c => c.match(/[\\d.]+/g).map(Number), lum = c => { const f = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]) }
  let paper = e.parentElement; while (paper && (numbers(getComputedStyle(paper).backgroundColor)[3] ?? 1) < 1) paper = paper.parentElement
  const [a, b] = [lum(numbers(colour)), lum(paper ? numbers(getComputedStyle(paper).backgroundColor) : [255, 255, 255])].sort((x, y) => x - y), r = e.getBoundingClientRect()
  return { part, name, wide, contrast: (b + .05) / (a + .05), inside: r.top >= 0 && r.bottom <= innerHeight && r.width > 0 }
}"""
CONTROLS = ["run", "step", "step-level", "unroll", "until", "target", "back", "replay", "fork", "other"]
PANELS = {
    "Curves": ["choice", "choice"],
    "Hypergradient": ["look", "against"],
    "Sets": [],
    "Methods": ["menu", "menu", "swap", "compare", "compiled", "option-iterations", "option-alpha"],
    "Doctor": ["examine", "finding-item", "apply"],
}


def opened(tab, title):
    panel(tab, title)
    if title == "Doctor":
        tab.page.wait_for_selector(".bn-finding-item")
    settled(tab)


def walk(tab):
    "What gets the focus, from the first control on, by the Tab key; ends outside the dashboard"
    tab.page.locator(".bn-run").focus()
    tab.page.keyboard.press("Shift+Tab")
    found = []
    while len(found) < 60:
        tab.page.keyboard.press("Tab")
        found.append(tab.page.evaluate(FOCUS))
        if found[-1]["part"] == "outside":
            return found[:-1]
    raise AssertionError(f"the focus goes round and round: {[f['name'] for f in found]}")


def test_the_tab_key_and_contrast(open_notebook):
    tab, worst = shown(open_notebook, MARKED), {}
    try:
        look_at_all(tab, worst)
    finally:
        tab.command("apputils:change-theme", theme="JupyterLab Light")
    print(f"\nworst contrast: {worst}")
    kinds = tab.page.evaluate("() => [...new Set([...document.querySelectorAll('.bn-mark:not(.bn-sample)')].map(m => m.dataset.kind))]")
    assert {"update", "by hand", "swap", "changed", "fork", "breakpoint"} == set(kinds), f"every kind of mark was looked at: {kinds}"
    tab.page.locator(".bn-dashboard .lm-TabBar-tab[tabindex='0']").focus()  # between the tabs by arrows
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_function("() => document.querySelector('.bn-dashboard .lm-TabBar-tab.lm-mod-current').textContent === 'Hypergradient'")
    faint = "() => { const e = document.querySelector('.bn-status p'); e.style.color = 'rgb(140, 140, 140)' }"  # the measure itself
    tab.page.evaluate(faint)
    seen = tab.page.evaluate(f"() => ({CONTRAST})(document.querySelector('.bn-status'))")
    assert seen[0]["r"] < 4.5 and "iteration" in seen[0]["what"], seen


def look_at_all(tab, worst):
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        tab.command("apputils:change-theme", theme=theme)
        tab.page.wait_for_function("dark => (document.body.dataset.jpThemeLight === 'false') === dark", arg="Dark" in theme)
        for title in PANELS:
            opened(tab, title)
            if "Light" in theme and title == "Methods":
                tab.click(".bn-compare")
                tab.page.wait_for_selector(".bn-comparison tbody tr")
                settled(tab)
            tab.screenshot(f"marked_{theme[11:].lower()}_{title.lower()}")
            seen = tab.page.evaluate(f"() => ({CONTRAST})(document.querySelector('.bn-dashboard'))")
            bad = [s for s in seen if s["r"] < (4.5 if s["kind"] == "text" else 3)]
            assert not bad and len(seen) > 30, (theme, title, bad)
            worst[theme] = {k: min([worst.get(theme, {}).get(k, 99), *(s["r"] for s in seen if s["kind"] == k)]) for k in ("text", "mark")}
            if "Light" in theme or title == "Methods":
                check_focus(tab, title)


def check_focus(tab, title):
    found = walk(tab)
    parts = [f["part"] for i, f in enumerate(found) if i == 0 or found[i - 1]["part"] != f["part"]]
    expected = ["controls", "levels", "tabs", "panel", "timeline", "breakpoints"]
    assert parts == [p for p in expected if p != "panel" or PANELS[title]], (title, parts)
    names = {p: [f["name"] for f in found if f["part"] == p] for p in expected}
    assert names["controls"] == CONTROLS and names["levels"][:2] == ["outer", "inner"] and len(names["tabs"]) == 1, names
    assert names["panel"][: len(PANELS[title])] == PANELS[title], (title, names["panel"])
    assert names["timeline"] == ["handle"] and names["breakpoints"] == ["kind", "at", "add", "on1", "drop1"], names
    unseen = [f for f in found if f["wide"] < 2 or f["contrast"] < 3 or not f["inside"]]
    assert not unseen, (title, unseen)
    tab.page.keyboard.press("Shift+Tab")
    assert tab.page.evaluate(FOCUS)["name"] == "drop1", "and back again"


PAIR = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from betty_nb import Config, Debugger, Engine, ImplicitProblem, debug
from betty_nb.app.demo import breast_cancer_program
debugger = Debugger(breast_cancer_program())
debugger.step(20)
one, two = debug(debugger), debug(debugger)
one.add_class("t-one"), two.add_class("t-two")
import ipywidgets
ipywidgets.HBox([ipywidgets.Box([one], layout=dict(width="50%")), ipywidgets.Box([two], layout=dict(width="50%"))])
"""
ILL = """
class Number(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(3))

class Upper(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner.module.value - 1).square().sum() + (self.third.module.value * self.module.value).sum()

class Inner(ImplicitProblem):
    def training_step(self, batch):
        return (self.module.value - 1).square().sum() + (self.outer.module.value.detach() * self.module.value).sum()

class Third(ImplicitProblem):
    def training_step(self, batch):
        return self.module.value.square().sum()

def level(cls, name):
    module = Number()
    return cls(name, None, module, torch.optim.SGD(module.parameters(), lr=0.1), train_data_loader=[0])

ill = Engine([level(Upper, "outer"), level(Inner, "inner"), level(Third, "third")], None, {"u2l": {"outer": ["inner"]}, "l2u": {"inner": ["outer"]}})
ill = Debugger(ill)
ill.step(3)
red = debug(ill)
red.add_class("t-red")
red.tabs.selected_index = 2
red
"""


def count(tab, which, level="inner"):
    return int(re.search(r"\d+", tab.text(f".{which} .bn-levels [data-level='{level}'] .bn-count"))[0])


def test_two_side_by_side_and_a_red_mismatch(open_notebook):
    tab = open_notebook(made(PAIR, "one.close()", ILL))
    tab.run_cell(0)
    tab.show(".t-one")
    tab.wait_text(".t-two .bn-status", "next:")
    before = count(tab, "t-two")
    assert count(tab, "t-one") == before
    tab.page.locator(".t-one .bn-levels [data-level='inner']").click()
    tab.wait_text(".t-one .bn-step-level", "step inner")
    tab.click(".t-one .bn-step-level")
    tab.wait_text(".t-two .bn-levels [data-level='inner'] .bn-count", str(before + 1))
    tab.wait_text(".t-one .bn-levels [data-level='inner'] .bn-count", str(before + 1))
    settled(tab)
    tab.screenshot("side_by_side")
    tab.click(".t-two .bn-run")
    tab.wait_text(".t-one .bn-status", "running")
    tab.click(".t-one .bn-pause")
    tab.wait_text(".t-two .bn-status", "next:")
    assert "running" not in tab.wait_text(".t-one .bn-status", "next:")
    tab.page.locator(".t-one .bn-levels [data-level='outer']").click()  # what is selected is each one's own
    tab.page.locator(".t-two .bn-levels [data-level='inner']").click()
    tab.wait_text(".t-two .bn-step-level", "step inner")
    assert "outer" in tab.text(".t-one .bn-step-level")
    tab.run_cell(1)  # one.close()
    tab.page.wait_for_selector(".t-one", state="detached")
    time.sleep(0.5)
    before = count(tab, "t-two")
    tab.click(".t-two .bn-step-level")
    tab.wait_text(".t-two .bn-levels [data-level='inner'] .bn-count", str(before + 1))
    assert tab.text(".t-two .bn-error").strip() == ""

    tab.run_cell(2)
    tab.page.wait_for_selector(".t-red .bn-sets .bn-bad")
    for level, names in (("inner", "'outer' -> 'inner' has no effect"), ("outer", "l2u={'third': ['outer']}")):
        tab.page.locator(f".t-red .bn-levels [data-level='{level}']").click()
        bad = tab.page.locator(".t-red .bn-sets .bn-bad", has_text=names).first
        bad.wait_for()
        colour = bad.evaluate("e => getComputedStyle(e).color")
        red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
        assert red > 2 * green and red > 2 * blue, colour
    bad.scroll_into_view_if_needed()
    tab.screenshot("red_sets")
    assert tab.errors() == []


BOARD = """
import warnings
warnings.simplefilter("ignore")
import tempfile, betty_nb
from betty_nb import EngineConfig
from betty_nb.app.demo import breast_cancer_program
engine = breast_cancer_program(engine_config=EngineConfig(train_iters=60, logger_type="tensorboard", log_dir=tempfile.mkdtemp(), strategy="cpu"))
engine.run()
board = betty_nb.tensorboard(engine, height=480)
"""


def test_tensorboard_in_the_notebook(open_notebook):
    tab = open_notebook(made(BOARD, "board.close()")).run_cell(0)
    assert tab.errors() == []
    inside = tab.page.frame_locator(".jp-OutputArea iframe")
    tab.page.locator(".jp-OutputArea iframe").evaluate("e => e.scrollIntoView({block: 'end'})")
    inside.get_by_text("/loss").first.wait_for()  # the card of a curve of this run
    inside.locator("canvas").first.wait_for()
    assert "inner" in inside.locator("body").inner_text() and "outer" in inside.locator("body").inner_text()
    tab.screenshot("tensorboard")
    tab.run_cell(1)
    assert tab.errors() == []


# JupyterLab and ipywidgets keep the elements of every widget that was ever shown. A dashboard should cost nothing beyond what the same layout of plain widgets costs.
CYCLES = """
import time
import anywidget
import ipywidgets as W
from IPython.display import clear_output, display
from betty_nb.widgets.dashboard import Dashboard
from betty_nb.widgets.live import Live
from betty_nb.widgets.panels import close_all

class Nothing(anywidget.AnyWidget):
    _esm = "export default { render({ el }) { el.textContent = 'x' } }"

def plain(w):
    if isinstance(w, Live):
        return Nothing()
    if isinstance(w, (W.Box, W.Tab)):
        return next(kind for kind in (W.Tab, W.HBox, W.VBox, W.Box) if isinstance(w, kind))([plain(c) for c in w.children])
    own = {k: getattr(w, k) for k in ("description", "icon", "options") if w.has_trait(k)}
    return W.HTML("x") if isinstance(w, W.HTML) else type(w)(**own)

def inside(w):
    return [x for c in getattr(w, "children", ()) for x in (*inside(c), c)]

def cycle(make, n=3):
    for _ in range(n):
        shown = make()
        display(shown)
        time.sleep(0.4)
        if not isinstance(shown, Dashboard):
            close_all(inside(shown))
        shown.close()
        clear_output()
        time.sleep(0.1)

pattern = Dashboard(debugger)
"""


def test_a_closed_dashboard_leaves_no_more_than_plain_widgets(open_notebook):
    setup = PAIR.split("one, two")[0] + CYCLES
    tab = open_notebook(made(setup, "cycle(lambda: plain(pattern))", "cycle(lambda: Dashboard(debugger))")).run_cell(0)
    client = tab.page.context.new_cdp_session(tab.page)
    client.send("Performance.enable")

    def look():
        time.sleep(0.7)
        for _ in range(3):
            client.send("HeapProfiler.collectGarbage")
        found = {m["name"]: m["value"] for m in client.send("Performance.getMetrics")["metrics"]}
        return found["Nodes"], found["JSEventListeners"], found["JSHeapUsedSize"] / 1024

    def left():
        "What is kept when the browser has come to rest: a busy one removes some of it a second later"
        found = [look(), look(), look()]
        while len(found) < 20 and not found[-3][:2] == found[-2][:2] == found[-1][:2]:
            found.append(look())
        return found[-1]

    cost = {}
    for cell, name in ((1, "plain"), (2, "dashboard")):
        tab.run_cell(cell)
        before = left()
        tab.run_cell(cell)
        cost[name] = [(b - a) / 3 for a, b in zip(before, left())]
    assert tab.errors() == []
    print("\nkept of one opened and closed:", *(f"{k}: {v[0]:.0f} nodes, {v[1]:.0f} listeners, {v[2]:.0f} kB" for k, v in cost.items()))
    (nodes, listeners, heap), own = cost["plain"], cost["dashboard"]
    assert own[0] < nodes + 30 and own[1] < listeners + 8 and own[2] < 1.4 * heap, cost
