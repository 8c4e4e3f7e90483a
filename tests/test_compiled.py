"Config(compile=True): the same numbers as without, and where that can't be had, a sentence and the usual way."

import logging
import statistics
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from betty_nb import Config, Debugger, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.benchmarks.by_hand import by_hand
from betty_nb.benchmarks.measure import Program, interleaved
from betty_nb.benchmarks.workloads import workload
from betty_nb.hypergradient.method import Linearization
from betty_nb.problems import compiled as code
from betty_nb.problems.compiled import Account, Compiled, Compiler, CompileWarning, Steps
from betty_nb.undisturbed import twice_differentiable, undisturbed
from tests.programs import BOTH, Vector, bits, noisy_program, pair, ridge_program
from tests.repo import ROOT, child_env


def missing():
    "Why nothing can be compiled here, or an empty string"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"no C++ compiler: {error}"
    return ""


compiler = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet():
    trace = logging.getLogger("torch.__trace")  # pytest would have torch write down all it does
    trace.propagate = False
    yield
    trace.propagate = True


def fit(self, batch):
    x, y = batch
    return F.mse_loss(self.module(x), y)


def program(
    step=fit, net=lambda: nn.Linear(4, 1), optimizer=None, sizes=(8,), dtype=torch.float32, scheduler=None, base=ImplicitProblem, whole=Engine, **config
):
    "One level that is trained on random numbers"
    torch.manual_seed(0)
    module = net().to(dtype)
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.05)))(module.parameters())
    batches = [(torch.randn(m, 4, dtype=dtype), torch.randn(m, 1, dtype=dtype)) for m in sizes]
    cls = type("Inner", (base,), {"training_step": step})
    inner = cls("inner", Config(**config), module, optimizer, scheduler and scheduler(optimizer), batches)
    torch.manual_seed(1)
    return whole([inner], EngineConfig(train_iters=10_000, strategy="cpu"))


def values(engine):
    "Parameters, buffers and the optimizer's state, as one vector"
    inner = engine.inner
    tensors = [*inner.module.parameters(), *inner.module.buffers()]
    tensors += [t for state in inner.optimizer.state.values() for t in state.values() if t is not None]
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def apart(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item()


def compare(steps=10, meanwhile=lambda engine, i: None, **options):
    "The relative difference between a run with compiled code and one without, and the engine of the former"
    found = []
    for on in (False, True):
        engine = program(compile=on and "now", **options)
        for i in range(steps):
            meanwhile(engine, i)
            engine.run(1)
        found.append(values(engine))
    return apart(*found), engine


def variants(engine):
    return {name: p.variants for name, p in engine.inner.compiled.programs.items()}


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True, dampening=0),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


@compiler
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_schedulers(name):
    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the scheduler's that its optimizer made no step
        off, engine = compare(12, optimizer=OPTIMIZERS[name], dtype=torch.float64, scheduler=halve)
    assert off < 1e-10, off
    assert variants(engine) == {"step": 1}, "another learning rate is not another program"


@compiler
def test_batches_of_any_size_and_counters_share_a_program():
    def step(self, batch):
        x, y = batch
        return {"loss": F.mse_loss(self.module(x), y) * (1 + self.count / 10), "examples": len(x), "count": self.count}

    off, engine = compare(9, step=step, sizes=(8, 5, 3))
    assert off < 1e-5, off
    assert (engine.inner.metrics["examples"], engine.inner.metrics["count"]) == (3, 8)
    assert variants(engine) == {"step": 2}, "one for the first size, one for all others"


@compiler
def test_modes_and_dropout():
    "Dropout draws the numbers of the usual way"

    def meanwhile(engine, i):
        engine.inner.module.train(i < 5)

    off, engine = compare(7, meanwhile, net=lambda: nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.3), nn.Linear(40, 1), nn.Dropout(0.5)))
    assert off < 1e-5, off
    assert variants(engine) == {"step": 2}, "one for training, one for evaluation"


@compiler
def test_live_program():
    "Off and on again, another module, a hook, another training_step, a learning rate set by hand: at the next action, without leftovers"

    def meanwhile(engine, i):
        inner = engine.inner
        if i == 3 and inner.config.compile:
            inner.config.compile = False
            meanwhile.on = True
        if i == 5 and meanwhile.on:
            assert inner.compiled is None
            inner.config.compile = "now"
            assert "compiled in" in str(inner.compiled)
        if i == 6:
            inner.optimizer.param_groups[0]["lr"] = 0.01
        if i == 8:
            torch.manual_seed(3)
            inner.set_module(nn.Linear(4, 1))
            inner.set_optimizer(torch.optim.SGD(inner.module.parameters(), lr=0.02))
            assert meanwhile.seen is None or variants(engine) == {"step": 1}
        if i == 10:
            inner.module.register_forward_hook(lambda module, args, result: 2 * result)
        if i == 12:
            type(inner).training_step = lambda self, batch: 3 * fit(self, batch)

    meanwhile.on, meanwhile.seen = False, None
    off, engine = compare(14, meanwhile)
    assert off < 1e-5, off
    assert engine.inner.compiled.steps > 0


@compiler
def test_accumulation_clipping_and_hooks():
    "The gradient is compiled, the update is the usual one"
    norms = []

    class Clipped(ImplicitProblem):
        def grad_callback(self):
            norms.append(self.module.weight.grad.norm().item())

    off, engine = compare(12, base=Clipped, sizes=(8, 8), gradient_accumulation=2, gradient_clipping=0.1, optimizer=OPTIMIZERS["Adam"])
    assert off < 1e-5, off
    assert variants(engine) == {"gradient": 1}
    assert len(norms) == 12 and min(norms) > 0.1


@compiler
def test_a_step_that_cannot_be_traced_is_named_and_goes_on(capsys):
    def step(self, batch):
        print("step", self.count)  # the line that is named
        return fit(self, batch)

    with pytest.warns(CompileWarning) as caught:
        off, engine = compare(4, step=step)
    assert off == 0
    (sentence,) = [str(w.message) for w in caught if issubclass(w.category, CompileWarning)]
    assert f"{__file__}:{step.__code__.co_firstlineno + 1}" in sentence and "the line that is named" in sentence, sentence
    assert "'inner'" in sentence and "\n" not in sentence
    assert capsys.readouterr().out.count("step 3") == 2
    assert "not compiled" in repr(engine)


@compiler
def test_a_step_that_changes_the_optimizer_goes_on_in_the_usual_way():
    def slower(self, batch):
        if self.count % 4 == 3:
            self.optimizer.param_groups[0]["lr"] *= 0.5
        return fit(self, batch)

    engine = program(slower, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), compile="now")
    engine.run(3)
    assert engine.inner.compiled.programs["step"].variants
    with pytest.warns(CompileWarning, match="changes options of an optimizer"):
        engine.run(1)
    engine.run(8)
    (group,) = engine.inner.optimizer.param_groups
    assert group["lr"] == 0.1 / 8 and group["capturable"] is False and str(engine.inner.compiled) == "not compiled"


@compiler
def test_debugger_goes_back_and_forth_bit_for_bit():
    def ready(compile):
        engine = noisy_program("darts")  # dropout, BatchNorm, Adam, a scheduler, shuffled data
        engine.inner.config.compile, engine.inner.config.gradient_clipping = compile and "now", 0.0
        return engine, Debugger(engine)

    engine, debugger = ready(True)
    debugger.step(2)
    start = bits(engine)
    debugger.step(17)
    usual, other = ready(False)
    other.step(19)
    assert apart(values(usual), values(engine)) < 1e-3  # the steps, buffers and mask of BatchNorm and dropout included
    assert usual.inner.module[1].num_batches_tracked == engine.inner.module[1].num_batches_tracked
    assert variants(engine) == {"step": 1, "upper": 1}
    end = bits(engine)
    debugger.back(17)
    assert all(map(torch.equal, start, bits(engine)))
    debugger.step(17)
    assert all(map(torch.equal, end, bits(engine)))


class Counting(nn.Module):
    "Its output depends on how often it was called, and on random numbers"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(F.dropout(x, 0.3)).tanh() * self.calls


@compiler
def test_products_of_one_point_see_one_mask_and_leave_one_evaluation_behind():
    def step(self, batch):
        return fit(self, batch) + (self.outer() * self.module.linear.weight.square()).sum()

    def upper(self, batch):
        return fit(self.inner, batch)

    inner = program(step, Counting, type="cg", cg_iterations=3).inner
    inner.config = Config(type="cg", cg_iterations=3)
    module = Vector(1, 1.0)
    outer = type("Outer", (ImplicitProblem,), {"training_step": upper})("outer", None, module, torch.optim.SGD(module.parameters(), lr=0.1))
    outer.train_data_loader = inner.train_data_loader
    engine = Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH)
    engine.run(2)
    found = []
    for on in (False, True, True):
        inner.config.compile = on and "now"
        torch.manual_seed(7)
        before, calls = torch.get_rng_state(), inner.module.calls.item()
        found.append(torch.cat([t.reshape(-1) for t in engine.probe("outer").indirect]))
        assert torch.equal(before, torch.get_rng_state()) and inner.module.calls.item() == calls
        local = Linearization(inner.loss, inner.trainable_parameters(), {}, "inner", inner, modules=[inner.module])
        with undisturbed([inner.module]):
            for _ in range(3):
                local.hvp(torch.ones(5))
            assert inner.module.calls.item() == calls + 1
    assert variants(engine) == {"Hessian": 1, "mixed": 1}
    assert apart(found[0], found[1]) < 1e-5, apart(found[0], found[1])
    assert torch.equal(found[1], found[2])


@compiler
@pytest.mark.parametrize("method", ["cg", "neumann", "darts"])
def test_hypergradients(method):
    found, options = [], {"cg": {"cg_iterations": 20}, "neumann": {"neumann_iterations": 5, "neumann_alpha": 0.3}}.get(method, {})
    for on in (False, True):
        engine, formula = ridge_program(method, compile=on and "now", **options)
        found.append(engine.probe("outer"))
    a, b = (torch.cat(f.total) for f in found)
    assert apart(a, b) < (1e-5 if method == "darts" else 1e-10), apart(a, b)
    assert found[0].passages["inner"].hvps == found[1].passages["inner"].hvps
    expected = {"upper": 1} if method == "darts" else {"Hessian": 1, "mixed": 1}
    assert variants(engine) == expected
    if method == "cg":
        assert apart(formula, b) < 1e-6


# Several steps in one call


@pytest.fixture
def calls(monkeypatch):
    "The number of steps of each call of a program of several"
    made, usual = [], Steps.__call__

    def call(self, problem, batches, *rest):
        result = usual(self, problem, batches, *rest)
        made.append(len(batches) if result is not None else 0)
        return result

    monkeypatch.setattr(Steps, "__call__", call)
    return made


def counters(engine):
    inner = engine.inner
    batch = next(i for i, one in enumerate(inner.train_data_loader) if one is inner.batch)
    found = {name: getattr(inner, name) for name in ("count", "steps", "drawn", "last_loss", "metrics", "stepped")}
    return {**found, "batch": batch, "iteration": engine.global_step, "upper": [p.count for p in engine.problems], "waiting": len(inner.waiting)}


def one_by_one(run):
    "What `run` gives where each step is made by itself"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compiled, "together", lambda self: 0)
        return run()


def agree(a, b, tolerance):
    close = all(abs(a[k] - b[k]) < tolerance if k == "last_loss" else a[k] == b[k] for k in a)
    assert close and a.keys() == b.keys(), (a, b)


@compiler
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_several_steps_are_those_made_one_by_one(name, calls):
    "With an upper level after each unroll, and a goal that is no multiple of it"

    def run():
        engine, _ = ridge_program("darts", compile="now", unroll_steps=5)
        x, y = engine.inner.train_data_loader[0]
        engine.inner.set_train_data_loader([(x + i / 10, y) for i in range(3)])
        engine.inner.set_optimizer(OPTIMIZERS[name](engine.inner.module.parameters()))
        for steps in (12, 21):
            engine.run(steps)
        return engine

    usual = one_by_one(run)
    assert not calls and usual.inner.last_loss.isfinite()
    engine = run()
    assert calls == [5] * 4, "not in the first unroll, not across the end of a run"
    agree(counters(usual), counters(engine), 1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(bits(usual), bits(engine), strict=True))
    assert variants(engine) == {"step": 1, "upper": 1, "steps": 1}, "the step that the optimizer counts is no constant"


class Records:
    "Everything that is logged"

    def __init__(self):
        self.lines = []

    def log(self, stats, tag, step):
        self.lines.append((tag, step, {name: float(value) for name, value in stats.items()}))


class Validated(Engine):
    def validation(self):
        return {"size": self.inner.module.weight.norm().item(), "iteration": self.global_step}


@compiler
@pytest.mark.parametrize("validate, log", [(3, -1), (4, -1), (10_000, 3), (10_000, 4)])
def test_what_falls_between_is_done_at_its_step(validate, log, calls):
    "Log entries, validations, and the beginning of an unroll"
    begun = []

    class Begun(ImplicitProblem):
        def on_inner_loop_start(self):
            begun.append((self.count, self.engine.global_step))

    def step(self, batch):
        return {"loss": fit(self, batch), "mean": batch[0].mean()}

    def run():
        engine = program(step, base=Begun, whole=Validated, sizes=(8,) * 7, compile="now", unroll_steps=3, log_step=log)
        engine.config.valid_step, engine.config.logger_type = validate, Records()
        engine.run(31)
        return engine

    usual, expected = one_by_one(run), begun[:]
    begun.clear()
    engine = run()
    assert begun == expected == [(i, i + 1) for i in range(0, 31, 3)]
    assert set(calls) == {3} and len(calls) == (9 if 3 in (validate, log) else 4)
    agree(counters(usual), counters(engine), 1e-6)
    a, b = usual.config.logger_type.lines, engine.config.logger_type.lines
    assert [line[:2] for line in a] == [line[:2] for line in b] and len(a) == 31 // min(validate, log if log > 0 else validate)
    assert all(x[2][name] == pytest.approx(y[2][name], rel=1e-5) for x, y in zip(a, b) for name in x[2])


def alternating():
    "Where the next batch may depend on the step before"
    while True:
        torch.manual_seed(2)
        yield torch.randn(8, 4), torch.ones(8, 1)


class Clamped(ImplicitProblem):
    def param_callback(self):
        with torch.no_grad():
            self.module.weight.clamp_(-0.1, 0.1)


def by_count(self, batch):
    return fit(self, batch) * (1 + self.count / 10)


ALONE = {
    "random numbers in the loss": {"net": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1))},
    "a scheduler": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)},
    "a hook after each update": {"base": Clamped},
    "batches of several sizes": {"sizes": (8, 6, 5)},
    "accumulation": {"gradient_accumulation": 2},
    "a generator as loader": {"loader": alternating},
    "an optimizer of another kind": {"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.01)},
    "a loss that counts": {"step": by_count},
}


@compiler
@pytest.mark.parametrize("case", ALONE)
def test_steps_are_made_one_by_one(case, calls):
    options = dict(ALONE[case])
    loader = options.pop("loader", None)

    def run(compile):
        engine = program(compile=compile, **options)
        if loader is not None:
            engine.inner.set_train_data_loader(loader())
        engine.run(22)
        return engine

    usual = run(False)
    if "step" in options:
        with pytest.warns(CompileWarning, match=r"'inner' makes its compiled steps one at a time.*self\.count"):
            engine = run("now")
        assert calls == [0], "and is not asked again"
    else:
        engine = run("now")
        assert not any(calls)
    assert apart(values(usual), values(engine)) < 1e-5
    assert engine.inner.compiled.steps > 10
    inner = engine.inner
    assert (inner.count, inner.steps, inner.drawn, engine.global_step) == (22, 22, 22, 22)


@compiler
def test_a_step_that_fails_fails_at_its_turn(calls):
    def step(self, batch):
        return (self.module(batch[0]) @ torch.linalg.cholesky(batch[1])).square().mean()

    found = []
    for compile in (False, "now"):
        engine = program(step, net=lambda: nn.Linear(4, 3), compile=compile)
        inner, good = engine.inner, torch.eye(3)
        inner.set_train_data_loader([(torch.full((8, 4), i / 20), good.clone() if i != 18 else -good) for i in range(20)])
        with pytest.raises(torch.linalg.LinAlgError):
            engine.run(30)
        failed = [counters(engine)[name] for name in ("count", "steps", "drawn", "iteration", "batch")]
        inner.batch[1].copy_(good)
        engine.run(10)
        found.append((failed, inner.count, inner.drawn, len(inner.waiting), values(engine)))
    assert found[0][:4] == found[1][:4] == ([18, 18, 19, 19, 18], 28, 28, 0)
    assert apart(found[0][4], found[1][4]) < 1e-5
    assert calls and set(calls) == {5}


@compiler
def test_an_attached_debugger_sees_each_step(calls):
    found, seen = [], []
    for attached in (False, True):
        engine = program(compile="now", optimizer=OPTIMIZERS["Adam"])
        if attached:
            debugger = Debugger(engine)
            calls.clear()
            debugger.run(20).wait(120)
        else:
            engine.run(20)
            assert calls == [5] * 3
        found.append(values(engine))
        seen.append(counters(engine))
    assert not calls
    agree(*seen, 1e-6)
    assert apart(*found) < 1e-5
    debugger.back(3)
    assert engine.inner.count == 17


@compiler
def test_a_run_can_be_stopped_between_calls(calls):
    class Stopping(ImplicitProblem):
        def on_inner_loop_start(self):
            if self.count == 10:
                self.engine.stop()

    engine = program(base=Stopping, compile="now", unroll_steps=5)
    engine.run(30)
    assert engine.inner.count == engine.completed == 11 and calls == [5], "after the action in progress, as without compiled code"
    engine.run(19)
    assert engine.inner.count == engine.completed == 30 and calls == [5] * 4


@compiler
def test_several_steps_in_one_call_when_that_pays(cheap, monkeypatch, calls):
    engine = program(compile=True)
    engine.run(100)
    assert calls and engine.inner.count == 100
    calls.clear()
    monkeypatch.setattr(Compiler, "each", 1.0)
    engine = program(compile=True)
    engine.inner.compiled.serves()
    engine.inner.compiled.accounts["step"] = account = Account(engine.inner)
    account.size, account.since = (10, 10), 0  # the step by itself pays
    engine.run(100)
    assert engine.inner.compiled.steps > 90 and not calls


@compiler
@pytest.mark.alone
def test_several_steps_in_one_call_are_quicker():
    class Single(Engine):
        def _take_several(self, p):
            return False

    class Side:
        def __init__(self, cls):
            work = workload("logistic")
            Lower = type("Lower", (ImplicitProblem,), {"training_step": lambda self, batch: work.losses["inner"](self.models, batch)})
            lower = Lower("lower", Config(compile="now"), work.modules["inner"], work.optimizer("inner"), train_data_loader=work.batches["inner"])
            lower.models = {**work.modules, "inner": lower}
            self.engine = cls([lower], EngineConfig(strategy="cpu", train_iters=10**9))
            self.engine.run(20)

        def run(self, n):
            self.engine.run(n)

    sides = {"one by one": Side(Single), "several": Side(Engine)}
    ratios = [interleaved(sides, rounds=5, seconds=0.03)["several"].processor for _ in range(3)]
    print(f"several steps in one call: {min(ratios):.2f} of the time one by one")
    assert statistics.median(ratios) < 1 / 1.3, ratios


def test_what_is_not_compiled_is_said():
    "No compiler is needed to say so"
    with pytest.warns(CompileWarning, match="'inner' goes on without compiled code.*the steps of its unroll"):
        program(base=IterativeProblem, type="unroll", compile=True).run(3)
    with pytest.warns(CompileWarning, match="'outer' goes on without compiled code.*take a hypergradient"):
        pair(outer=Config(compile=True)).run(2)
    with pytest.warns(CompileWarning, match="precision='fp16'"):
        program(compile=True, precision="fp16").run(3)


def test_the_switch_of_the_debugger():
    engine, _ = ridge_program("cg")
    debugger = Debugger(engine)
    assert debugger.compile("inner").summary() == "inner: not compiled -> compiled, from the next action on." and engine.inner.config.compile == "now"
    assert debugger.timeline_record().marks[-1].text == "not compiled -> compiled"
    assert debugger.compile("inner", False).after == "not compiled" and not engine.inner.config.compile
    engine.inner.config.compile = True
    assert debugger.compile("inner").before == "compiled as soon as it pays" and engine.inner.config.compile == "now"
    recorded = Debugger(noisy_program("unroll"))
    with pytest.raises(ValueError, match="can't be compiled: the steps of its unroll are recorded one by one"):
        recorded.compile("inner")
    assert not recorded.engine.inner.config.compile


@compiler
def test_the_checkbox_of_the_dashboard(cheap):
    "It shows what is the case: checked when a level that waits has been compiled, too"
    from betty_nb.widgets.dashboard import Dashboard

    engine = ridge_program("cg", compile=True)[0]
    dashboard = Dashboard(Debugger(engine))
    panel = dashboard.methods

    def shown():
        panel.paint(dashboard.debugger.state)
        return panel.compiled.value

    assert not shown()
    engine.run(60)
    assert engine.inner.compiled.seconds and shown()
    panel.compiled.value = False
    wait_for(lambda: engine.inner.config.compile is False)
    assert not shown()
    panel.compiled.value = True
    wait_for(lambda: engine.inner.config.compile == "now")
    assert shown()
    dashboard.close()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_a_compiler():
    import torch._inductor.config as inductor

    def step(self, batch):  # nothing that was compiled before
        return fit(self, batch) + 0.12345 * self.module.weight.cos().sum()

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.warns(CompileWarning, match="torch finds no compiler here: install"):
        off, _ = compare(4, step=step)
    assert off == 0


# compile=True: as soon as it pays


def moved(name, method, steps, **options):
    "All parameters of a workload after some steps of its upper level, and the engine"
    side = Program(workload(name), method, **options)
    side.run(steps)
    return torch.cat([p.detach().reshape(-1) for module in side.work.modules.values() for p in module.parameters()]), side.engine


def short_runs():
    "For a process in which nothing has been compiled yet"
    for method in ("darts", "cg"):
        a, b = moved("logistic", method, 200), moved("logistic", method, 200, compile=True)
        assert torch.equal(a[0], b[0])
        assert b[1].inner.steps == 1000 and not b[1].inner.compiled.programs
        assert "not compiled: pays after about" in repr(b[1].inner) and "not compiled: pays after about" in str(b[1].summary())
    assert "torch._inductor.compile_fx" not in sys.modules and not Compiler._started


def test_a_short_run_is_left_to_the_usual_way():
    "A thousand steps: torch's compiler is not even loaded, and the bits are the usual ones"
    code = "from tests.test_compiled import short_runs; short_runs()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child_env(), check=True)


@pytest.fixture
def cheap(monkeypatch):
    "Compiling is expected to take no time"
    monkeypatch.setattr(Compiler, "start", 0.0)
    monkeypatch.setattr(Compiler, "each", 1e-12)
    monkeypatch.setattr(Compiler, "took", lambda seconds, expected: None)


@pytest.fixture
def after_200(monkeypatch):
    "Compiling pays after 200 calls, however long they take"
    monkeypatch.setattr(Account, "least_calls", lambda self: 200 if self.calls >= self.sure else None)


@compiler
@pytest.mark.parametrize("method, expected", [("cg", {"step", "steps", "Hessian", "mixed"}), ("darts", {"step", "steps", "upper"})])
def test_a_long_run_is_compiled(method, expected, cheap):
    a, b = moved("logistic", method, 40), moved("logistic", method, 40, compile=True)
    compiled = b[1].inner.compiled
    assert set(compiled.programs) == expected
    assert compiled.accounts["step"].calls <= Account.sure + 1 and compiled.accounts["step"].size == (10, 10)
    assert apart(a[0], b[0]) < 1e-4, apart(a[0], b[0])
    assert "compiled in" in repr(b[1].inner) and "pays" not in repr(b[1].inner)


@compiler
def test_what_counts_are_the_steps_to_come_and_those_that_were_made(after_200):
    def steps_in_the_usual_way(*runs):
        engine = program(compile=True)
        for n in runs:
            engine.run(n)
        return engine.inner.compiled.accounts["step"].calls, variants(engine)

    assert steps_in_the_usual_way(150) == (149, {})  # without the first, which is always made in the usual way
    assert steps_in_the_usual_way(1000) == (11, {"step": 1, "steps": 1})
    assert steps_in_the_usual_way(150, 1000) == (150, {"step": 1, "steps": 1})
    calls, compiled = steps_in_the_usual_way(*[50] * 6)
    assert 200 < calls <= 211 and compiled == {"step": 1}, "many short runs"
    engine = program(compile=True)
    for _ in range(300):
        engine.by_hand("inner")
    assert 200 < engine.inner.compiled.accounts["step"].calls <= 211 and variants(engine) == {"step": 1}


@compiler
def test_what_was_computed_in_the_usual_way_is_repeated_so(after_200):
    debugger = Debugger(moved("logistic", "cg", 1, compile=True)[1])
    engine = debugger.engine
    debugger.run(400).wait(120)
    compiled, end = engine.inner.compiled, bits(engine)
    assert compiled.accounts["step"].since < 50 and set(compiled.programs) == {"step", "Hessian", "mixed"}
    debugger.back(debugger.state.index - 5)
    assert engine.completed < 10
    debugger.run(405 - engine.completed).wait(120)
    assert all(map(torch.equal, end, bits(debugger.engine)))


@compiler
def test_live_change_of_when():
    engine = program(compile=True)
    engine.run(30)
    assert variants(engine) == {} and "pays after about" in repr(engine.inner)
    engine.inner.config.compile = "now"
    engine.run(1)
    assert variants(engine) == {"step": 1} and "compiled in" in repr(engine.inner)
    engine.inner.config.compile = False
    engine.run(1)
    assert engine.inner.compiled is None and "compiled" not in repr(engine.inner)
    engine.inner.config.compile = True
    engine.run(3)
    assert engine.inner.compiled.steps == 3, "what has been compiled is used"


@pytest.mark.alone
@pytest.mark.parametrize("name", ["logistic"])
def test_a_thousand_steps_take_no_longer_than_without(name):
    def ratio():
        sides = [(Program(workload(name), "darts", compile=on), times) for on, times in zip((False, True), ([], []))]
        for i in range(10):  # in turn, so that what else the machine does falls on both alike
            for side, times in sides[:: 1 - 2 * (i % 2)]:
                start = time.thread_time()
                side.run(20)
                times.append(time.thread_time() - start)
        assert all(side.engine.inner.steps == 1000 for side, _ in sides)
        return sum(sides[1][1]) / sum(sides[0][1])

    ratio()
    ratios = [ratio() for _ in range(5)]
    print(f"{name}: {statistics.median(ratios):.3f} of the usual time")
    assert statistics.median(ratios) <= 1.05, ratios


def test_nothing_is_loaded_until_it_is_asked_for():
    code = "import sys, betty_nb.engine; print('torch._dynamo' in sys.modules, 'betty_nb.problems.compiled' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child_env(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@compiler
@pytest.mark.alone
def test_a_small_level_takes_half_the_time_of_the_loop_by_hand():
    class Hand:
        def __init__(self, work):
            self.loop = by_hand(work, "darts")

        def run(self, n):
            loop, work = self.loop, self.loop.work
            optimizer, batch = loop.optimizers["inner"], work.batches["inner"][0]
            for _ in range(n):
                optimizer.zero_grad()
                work.losses["inner"](work.modules, batch).backward(inputs=loop.theta)
                optimizer.step()

    class Ours:
        def __init__(self, work):
            self.engine = Program(work, "darts", compile="now").engine

        def run(self, n):
            for _ in range(n):
                self.engine.by_hand("inner")

    sides = {"by hand": Hand(workload("logistic")), "compiled": Ours(workload("logistic"))}
    ratios = [interleaved(sides, rounds=5, seconds=0.03)["compiled"].processor for _ in range(3)]
    print(f"compiled: {min(ratios):.2f} of the loop by hand, {sides['compiled'].engine.inner.compiled}")
    assert min(ratios) < 0.6 and statistics.median(ratios) < 0.8, ratios


# What the user has compiled


def weighted(method, base=ImplicitProblem, change=lambda net: net, loss=F.mse_loss, **config):
    "A learned weight decay of a small network, which `change` may compile"
    torch.manual_seed(0)
    net, decay = change(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()), Vector(1, -2.0).double()
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    class Inner(base):
        def training_step(self, batch):
            x, y = batch
            return loss(self.module(x), y) + self.outer().exp().sum() * sum(p.square().sum() for p in self.module.parameters())

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return F.mse_loss(self.inner(x), y)

    inner = Inner("inner", Config(type=method, unroll_steps=3, **config), net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=[batch])
    outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1), train_data_loader=[batch])
    return Engine([outer, inner], EngineConfig(train_iters=1000, strategy="cpu"), BOTH)


def in_place(net):
    net.compile(backend="aot_eager")
    return net


CHANGES = {"inductor": torch.compile, "aot_eager": lambda net: torch.compile(net, backend="aot_eager"), "in place": in_place}


@compiler
@pytest.mark.parametrize(
    "method, base, change",
    [
        ("cg", ImplicitProblem, "inductor"),
        ("neumann", ImplicitProblem, "in place"),
        ("exact", ImplicitProblem, "aot_eager"),
        ("darts", ImplicitProblem, "aot_eager"),
        ("unroll", IterativeProblem, "inductor"),
        ("forward_mode", IterativeProblem, "in place"),
    ],
)
def test_modules_that_the_user_has_compiled(method, base, change, monkeypatch):
    "torch's compiled code has no second derivative: `donated buffer` and `double backward` are its errors"
    monkeypatch.setattr(twice_differentiable, "compiled", False)
    plain, compiled = weighted(method, base), weighted(method, base, CHANGES[change])
    plain.run(12), compiled.run(12)
    assert apart(*(torch.cat([p.detach().reshape(-1) for p in e.inner.module.parameters()]) for e in (plain, compiled))) < 1e-9
    assert apart(*(engine.probe("outer").total[0] for engine in (plain, compiled))) < 1e-6
    debugger = Debugger(compiled)
    debugger.run(2).wait(60)
    assert debugger.hypergradient("outer").error is not None
    debugger.back(5)
    debugger.run(1).wait(60)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@compiler
def test_functions_that_the_user_has_compiled(monkeypatch):
    monkeypatch.setattr(twice_differentiable, "compiled", False)
    loss = torch.compile(lambda x, y: (x - y).square().mean().exp(), backend="aot_eager")
    weighted("darts", loss=loss).run(6)
    engine = weighted("cg", loss=loss)
    with pytest.raises(RuntimeError, match=r"torch.compile.*Config\(compile=True\).*'darts'"):
        engine.run(6)


@compiler
def test_a_compiled_level_of_a_module_that_the_user_has_compiled():
    plain, both = weighted("cg"), weighted("cg", change=torch.compile, compile="now")
    plain.run(12), both.run(12)
    assert apart(plain.outer.module.value.detach(), both.outer.module.value.detach()) < 1e-9
    assert {"step", "Hessian", "mixed"} <= set(both.inner.compiled.programs)


@compiler
def test_a_debugger_looks_at_compiled_levels():
    "It measures memory operation by operation, and torch runs no compiled code where somebody watches those"
    plain, compiled = weighted("cg"), weighted("cg", compile="now")
    found = []
    for engine in (plain, compiled):
        engine.run(12)
        debugger = Debugger(engine)
        debugger.run(3).wait(60)
        found.append(engine.probe("outer").total[0])
        assert debugger.hypergradient("outer").error is not None
        methods = debugger.compare("outer", ["cg", "neumann", "darts"])
        assert all(row.error is not None for row in methods.rows), methods
    assert apart(*found) < 1e-6


# CUDA graphs; that they are replayed is in test_cuda


@compiler
@pytest.mark.parametrize("graphs", [False, True])
def test_what_a_graph_returns_is_copied_and_what_it_writes_to_stays_in_place(graphs):
    engine = program(optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    engine.run(2)
    inner, said = engine.inner, []
    theta = inner.trainable_parameters()
    compiled = code.Program(code.hessian_product, said.append, graphs=graphs)
    v = torch.randn(sum(p.numel() for p in theta), dtype=theta[0].dtype)
    (first,), (second,) = (compiled(inner, inner.batch, None, theta, scale * v) for scale in (1, 2))
    assert not said and compiled.variants == 1
    assert torch.allclose(2 * first, second) and first.data_ptr() != second.data_ptr()
    assert {hasattr(inner.optimizer.state[p]["exp_avg"], "_dynamo_static_input_type") for p in theta} == {graphs}  # torch marks parameters by itself


@compiler
def test_a_graph_that_cannot_be_recorded_is_said_and_the_level_goes_on(monkeypatch):
    engine = program(compile="now", cuda_graphs=True)
    engine.run(3)
    step = engine.inner.compiled.programs["step"]
    assert not step.graphs and step.variants  # on the CPU there is none
    step.graphs = True

    def fails(*args):
        raise RuntimeError("CUDAGraph capture was invalidated")

    step._compiled = fails
    monkeypatch.setattr(engine.inner.compiled, "program", lambda *args: step)
    with pytest.warns(CompileWarning, match="its CUDA graph could not be recorded or replayed .CUDAGraph capture was invalidated.: set Config.cuda_graphs=False."):
        engine.run(4)
    assert engine.inner.steps == 7
