"The engine: interrupts, failures, early stopping, loggers, waiting for the device, memory."

import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from betty_nb import Config, Engine, EngineConfig, GraphWarning, ImplicitProblem
from betty_nb.debugger import Debugger
from betty_nb.logging import TensorBoardLogger, numbers
from tests.programs import BOTH, bits, level, noisy_program, pair, ridge_program, same
from tests.repo import ROOT, child_env

main_thread = pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals arrive in the main thread")


class Counter:
    "A watcher: how many actions were performed"

    count = 0

    def before(self, action):
        pass

    def after(self, action):
        self.count += 1


class Aside:
    "Two programs draw from one random generator: each has its state put in place for its turn"

    def __init__(self):
        self.state = torch.get_rng_state()

    def __enter__(self):
        torch.set_rng_state(self.state)

    def __exit__(self, *error):
        self.state = torch.get_rng_state()


def interrupt_soon(rng, seconds):
    threading.Timer(rng.random() * seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


# --- interrupts


@main_thread
@pytest.mark.parametrize("method", ["cg", "unroll"])
def test_an_interrupt_ends_a_run_at_a_whole_action(method, capfd):
    running, here = noisy_program(method), Aside()
    reference, there = noisy_program(method), Aside()
    counter, rng, done, moments = Counter(), random.Random(1), 0, set()
    running.watchers.append(counter)
    for _ in range(100):
        with here, pytest.raises(KeyboardInterrupt):
            interrupt_soon(rng, 0.01)
            running.run(10**6)
        with there:
            for _ in range(counter.count - done):
                reference.advance()
            expected = bits(reference)
        done = counter.count
        moments.add(running.next_action.kind)
        assert not running.running and running.completed == reference.completed and running.next_action == reference.next_action
        assert same([*bits(running)[:-1], here.state], expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    in_time = capfd.readouterr().err.count("Once more interrupts at once")  # the others came before the run had begun
    print(f"{method}: {in_time} of 100 interrupts in {done} actions, before one of {sorted(moments)}")
    assert in_time > 30 and {"draw", "descend"} <= moments


@main_thread
def test_an_interrupt_ends_a_debuggers_step_at_a_whole_action():
    running, here = noisy_program(), Aside()
    reference, there = noisy_program(), Aside()
    debugger, rng = Debugger(running), random.Random(2)
    for _ in range(10):
        with here, pytest.raises(KeyboardInterrupt):
            interrupt_soon(rng, 0.02)
            debugger.step(10**6)
    with there:
        for _ in range(debugger.timeline.index):
            reference.advance()
        expected = bits(reference)
    assert same([*bits(running)[:-1], here.state], expected)
    with here:
        debugger.step(3)
        debugger.back(3)


@main_thread
def test_the_second_interrupt_does_not_wait():
    engine, slow = pair(), threading.Event()

    def training_step(batch):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        slow.set()

    engine.run(3)
    before, step = bits(engine), engine.inner.training_step
    engine.inner.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert not slow.is_set() and not engine.running and same(bits(engine), before)
    engine.inner.training_step = step
    engine.run(2)
    assert (engine.inner.steps, engine.completed) == (5, 5)


@main_thread
def test_an_interrupt_in_a_validation_waits_for_its_end():
    class Validated(Engine):
        def validation(self):
            os.kill(os.getpid(), signal.SIGINT)
            return {"loss": 0.5}

    engine = Validated([level("inner")], EngineConfig(valid_step=2, train_iters=10, strategy="cpu"))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert engine.validated == {"loss": 0.5} and engine.completed == 2


@main_thread
def test_the_workers_of_a_loader_outlive_an_interrupt():
    "In a terminal, and in a notebook, Ctrl-C reaches them too"
    data = [torch.tensor(float(i)) for i in range(1000)]
    inner = level("inner")
    inner.train_data_loader = DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context="fork")
    engine = Engine([inner], EngineConfig(strategy="cpu"))

    def interrupt_all():
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(1.0, interrupt_all).start()
    with pytest.raises(KeyboardInterrupt):
        engine.run(10**9)
    steps = engine.inner.steps
    assert steps
    engine.run(20)
    assert engine.inner.steps == steps + 20


@pytest.mark.parametrize("how", ["begun anew", "persistent", "held by their loaders"])
def test_the_workers_of_loaders_end_at_once_with_their_program(how):
    "The collector finds them in a circle of references; torch alone takes five seconds for each loader then (15.1 measured for three)"

    def run():
        levels = [level(name) for name in ("one", "two", "three")]
        of_program = dict(collate_fn=lambda examples: torch.stack(examples) * len(levels), multiprocessing_context="fork")
        options = {"begun anew": {}, "persistent": dict(persistent_workers=True), "held by their loaders": of_program}[how]
        for p in levels:
            p.train_data_loader = DataLoader([torch.tensor(1.0)] * 5, num_workers=1, **options)
        engine = Engine(levels, EngineConfig(strategy="cpu"))
        engine.run(7)  # one loader has begun its second pass
        return weakref.ref(engine), [w for p in levels for w in p.sources()[0]._iterator._workers]

    gc.disable()
    try:
        engine, workers = run()
        start = time.perf_counter()
        gc.collect()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    assert len(workers) == 3 and engine() is None and not any(w.is_alive() for w in workers)
    assert seconds < 4, seconds


@main_thread
def test_somebody_elses_handler_stays():
    called = []
    old = signal.signal(signal.SIGINT, lambda *_: called.append(1))
    try:
        engine = pair()
        engine.inner.grad_callback = lambda: signal.raise_signal(signal.SIGINT)
        engine.run(2)
    finally:
        signal.signal(signal.SIGINT, old)
    assert called == [1, 1]


# --- failures


class Failure(Exception):
    pass


def fail_at(problem, hook, at):
    "Let `hook` of a problem raise when it is called for the `at`-th time, before it does anything"
    original, calls = getattr(problem, hook), []

    @functools.wraps(original)
    def failing(*args):
        calls.append(1)
        if len(calls) == at:
            raise Failure
        return original(*args)

    setattr(problem, hook, failing)


@pytest.mark.parametrize("hook", ["training_step", "get_batch", "grad_callback", "param_callback", "on_inner_loop_start", "custom_optimizer_step"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_goes_on_after_a_failure_as_if_it_had_not_been(hook, accumulation):
    def program():
        engine, _ = ridge_program("cg", unroll_steps=2, gradient_accumulation=accumulation)
        engine.outer.config.gradient_accumulation = accumulation
        return engine

    for name in ("inner", "outer"):
        for at in (1, 3):
            engine, reference = program(), program()
            fail_at(engine.level(name), hook, at)
            engine.level(name).reader = engine.level(name).get_batch
            with pytest.raises(Failure):
                engine.run(30)
            assert not engine.running
            engine.run(30 - engine.completed)
            reference.run(30)
            assert (engine.inner.steps, engine.outer.steps) == (reference.inner.steps, reference.outer.steps)
            assert same(bits(engine), bits(reference)), f"{hook} of {name}, call {at}"


@pytest.mark.parametrize("method", ["cg", "darts", "unroll"])
def test_a_failure_in_a_training_step_harms_nothing(method):
    rng = random.Random(0)
    for _ in range(3):
        engine, name = noisy_program(method), rng.choice(["inner", "outer"])
        fail_at(engine.level(name), "training_step", rng.randrange(3, 8))
        with contextlib.suppress(Failure):
            while True:
                before = [t for q in engine.problems for t in (*q.module.parameters(), *(p.grad for p in q.module.parameters() if p.grad is not None))]
                before, action = [t.detach().clone() for t in before], engine.next_action
                engine.advance()
        after = [t for q in engine.problems for t in (*q.module.parameters(), *(p.grad for p in q.module.parameters() if p.grad is not None))]
        assert engine.next_action == action and same(after, before)
        engine.run(10)


def test_a_logger_that_fails_costs_no_step():
    class Full:
        def log(self, stats, tag, step):
            raise OSError("No space left on device")

    engine, _ = ridge_program("cg", log_step=1)
    reference, _ = ridge_program("cg")
    engine.config.logger_type = Full()
    with pytest.raises(OSError):
        engine.run(10)
    engine.config.logger_type = "none"
    engine.run(10 - engine.completed)
    reference.run(10)
    assert same(bits(engine), bits(reference)) and engine.inner.steps == engine.outer.steps == 10


def test_a_failing_step_of_a_train_step_is_made_up_for():
    class Own(Engine):
        def train_step(self):
            self.inner.step()

    inner = level("inner")
    engine = Own([inner], EngineConfig(strategy="cpu"))
    fail_at(inner, "param_callback", 3)
    with pytest.raises(Failure):
        engine.run(5)
    assert inner.steps == 3
    engine.run(1)


# --- defect 13: cells that are run again, edges that change, options read when they are used


def test_defect_13_running_the_engine_cell_again():
    problems = [level("outer", None, ("inner",)), level("inner", Config(unroll_steps=2), ("outer",))]
    first = Engine(problems, EngineConfig(train_iters=10, strategy="cpu"), BOTH)
    first.run(4)
    second = Engine(problems, EngineConfig(train_iters=10, strategy="cpu"), BOTH)
    assert (second.completed, second.inner.steps) == (0, 0)
    second.run()
    assert second.outer.steps == 5
    with pytest.raises(RuntimeError, match="Another engine has been built"):
        first.run()
    second.claim()
    with pytest.raises(RuntimeError, match="is running: pause it"):
        Engine(problems, None, BOTH)
    second.release()


def test_defect_13_the_edges_of_a_live_engine():
    engine = pair(inner=Config(unroll_steps=2))
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    with pytest.warns(GraphWarning, match="gets no hypergradient"):
        engine.set_dependency({"l2u": {"inner": ["outer"]}})  # no u2l any more: outer has a direct gradient only
    assert engine.outer.paths == [] and engine.outer.children == [engine.inner]
    engine.run(3)
    assert engine.outer.steps == 2, "the step that was due is made too"
    engine.set_dependency(BOTH)
    engine.run(2)
    assert engine.outer.steps == 3 and engine.probe("outer").passages
    engine.set_dependency({})
    assert engine.outer.children == [] and engine.outer.leaf
    engine.run(2)
    assert engine.outer.steps == 5


def test_defect_13_edges_that_change_between_hypergradient_and_descent():
    engine, reference = pair(), pair()
    for e in (engine, reference):
        while e.next_action != type(e.next_action)("descend", "outer"):
            e.advance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphWarning)
        engine.set_dependency({"l2u": {"inner": ["outer"]}})
    engine.advance(), reference.advance()
    assert same(bits(engine), bits(reference)), "the gradient that was taken is used, once"


def test_defect_13_a_refused_change_of_edges_changes_nothing():
    engine = pair()
    engine.advance()
    before = engine.graph, engine.next_action
    with pytest.raises(ValueError):
        engine.set_dependency({"l2u": {"inner": ["outer"], "outer": ["inner"]}})
    assert (engine.graph, engine.next_action) == before


def test_defect_13_options_are_read_when_they_are_used():
    engine = pair(inner=Config(unroll_steps=1))
    lines = []

    class Lines:
        def log(self, stats, tag, step):
            lines.append((tag, step))
            if tag == "inner" and step == 8:
                engine.config.train_iters = 10  # in the middle of the run

    engine.config.train_iters = 100
    engine.config.logger_type = Lines()
    engine.inner.config.log_step, engine.inner.config.unroll_steps = 4, 4
    engine.run()
    assert engine.completed == 10 and engine.outer.steps == 2 and lines == [("inner", 4), ("inner", 8)]


# --- defect 14: early stopping, wandb, metrics


def validated(losses, **options):
    "An engine whose n-th validation gives losses[n]"
    values = iter(losses)

    class Validated(Engine):
        def validation(self):
            return next(values)

    return Validated([level("inner")], EngineConfig(valid_step=2, train_iters=1000, strategy="cpu", early_stopping=True, **options))


def test_defect_14_early_stopping(capsys):
    losses = [1.0, 0.5, torch.tensor(0.6), float("nan"), 0.7, 0.4, 0.5, 0.5, 0.5]
    engine = validated(losses, early_stopping_tolerance=3)
    engine.run()
    assert engine.completed == 10 and (engine.early_stopping.best, engine.early_stopping.step) == (0.5, 4)
    assert capsys.readouterr().out == "Early stopping in iteration 10: 'loss' has not improved in 3 validations; the best was 0.5 in iteration 4.\n"
    engine.run()
    assert engine.completed == 18 and engine.early_stopping.best == 0.4, "a later run goes on with the whole tolerance"


def test_defect_14_early_stopping_of_a_metric_that_grows():
    stats = [{"val": {"acc": a}} for a in (0.5, 0.6, 0.55, 0.6, 0.7)]
    engine = validated(stats, early_stopping_mode="max", early_stopping_metric="val/acc", early_stopping_tolerance=2)
    engine.run()
    assert engine.completed == 8 and engine.early_stopping.step == 4


def test_defect_14_early_stopping_needs_its_metric():
    engine = validated([{"accuracy": 0.5}], early_stopping_metric="acuracy")
    with pytest.raises(ValueError, match="early_stopping_metric='acuracy'.*did you mean 'accuracy'"):
        engine.run()


def test_defect_14_early_stopping_goes_back_with_the_program():
    debugger = Debugger(validated([1.0, 0.5, 0.7, 0.8, 0.5]))
    debugger.step(9)
    assert debugger.engine.early_stopping.waited == 1
    debugger.back(5)
    assert (debugger.engine.early_stopping.best, debugger.engine.early_stopping.waited) == (1.0, 0)


def test_validation_sees_evaluation_mode_and_may_differentiate():
    class Validated(Engine):
        def validation(self):
            assert torch.is_grad_enabled() and not self.inner.module.training
            return self.inner.module().sum().detach()

    engine = Validated([level("inner")], EngineConfig(valid_step=1, strategy="cpu"))
    frozen = torch.nn.Dropout().eval()
    engine.inner.module.frozen = frozen
    engine.run(1)
    assert engine.inner.module.training and not frozen.training and set(engine.validated) == {"loss"}


def test_defect_14_dict_metrics(tmp_path):
    class Rich(ImplicitProblem):
        def training_step(self, batch):
            loss = (self.module() - 1).square().sum()
            return {"loss": loss, "parts": {"fit": loss, "norm": {"2": self.module().norm()}}, "note": "text", "entries": self.module()}

    entries = []

    class Mine:
        def log(self, stats, tag, step):
            entries.append((numbers(stats), tag, step))

    inner = level("inner", Config(log_step=2), cls=Rich)
    engine = Engine([inner], EngineConfig(strategy="cpu", logger_type=Mine()))
    with pytest.warns(RuntimeWarning, match="'entries' is not logged, since it is 3 numbers: reduce it"):
        engine.run(4)
    assert [(tag, step, set(stats)) for stats, tag, step in entries] == [("inner", s, {"loss", "parts/fit", "parts/norm/2"}) for s in (2, 4)]
    assert all(isinstance(v, float) for stats, *_ in entries for v in stats.values())


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def test_tensorboard_keeps_scalars_histograms_graph_and_options(tmp_path):
    class Validated(Engine):
        def validation(self):
            return {"loss": 0.5, "top": {"1": 0.25}}

    levels = [level("outer", Config(log_step=3), ("inner",)), level("inner", Config(type="cg", log_step=2, log_local_step=True), ("outer",))]
    config = EngineConfig(train_iters=12, valid_step=6, strategy="cpu", logger_type="tensorboard", log_dir=str(tmp_path))
    engine = Validated(levels, config, BOTH)
    engine.run(6)
    files = len(list(tmp_path.iterdir()))
    engine.run(6)
    assert len(list(tmp_path.iterdir())) == files + 1, "the first file was closed, the second run appends another"
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("inner/loss")] == [2, 4, 6, 8, 10, 12]
    assert [(e.step, e.value) for e in read.Scalars("validation/top/1")] == [(6, 0.25), (12, 0.25)]
    assert [e.step for e in read.Histograms("outer/hypergradient/value")] == [3, 6, 9, 12]
    nodes = {node.name: list(node.input) for node in read.Graph().node}
    assert nodes == {"outer": ["inner"], "inner": ["^outer"]}
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["inner/method"].string_value == "cg(iterations=1)" and hparams["engine/train_iters"].number_value == 12
    assert hparams["inner/optimizer/lr"].number_value == pytest.approx(0.1)
    assert not engine._shown, "no hypergradient is held after it was logged"


def test_the_histogram_is_that_of_the_step(tmp_path):
    engine, formula = ridge_program("exact")
    engine.outer.config.log_step = 1
    seen = []

    class Mine(TensorBoardLogger):
        def histogram(self, tensors, tag, step):
            seen.append((tag, step, tensors))
            super().histogram(tensors, tag, step)

    engine.inner.optimizer.param_groups[0]["lr"] = 0.0
    engine.logger = Mine(str(tmp_path))
    engine.run(1)
    (tag, step, tensors), *rest = seen
    assert not rest and (tag, step, list(tensors)) == ("outer", 1, ["hypergradient/value"])
    assert torch.allclose(tensors["hypergradient/value"], formula, rtol=1e-10)


def test_defect_14_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "multilevel")
    monkeypatch.setenv("WANDB_SILENT", "true")
    levels = [level("outer", Config(log_step=2), ("inner",)), level("inner", Config(type="cg", log_step=2), ("outer",))]
    engine = Engine(levels, EngineConfig(strategy="cpu", logger_type="wandb", log_dir=str(tmp_path)), BOTH)
    engine.run(4)
    run = engine.logger.run
    engine.run(2)
    assert engine.logger.run is run, "a later run of the engine goes on in the same run"
    assert run.project == "multilevel" and run.config["inner/method"] == "cg(iterations=1)"
    assert run.summary["inner/loss"] == pytest.approx(engine.inner.last_loss.item()) and run.summary["outer/step"] == 6
    assert "outer/hypergradient/value" in run.summary.keys()
    engine.logger.close()
    written = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 0
    assert wandb.run is None


def test_wandb_missing_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    engine = Engine([level("inner", Config(log_step=1))], EngineConfig(strategy="cpu", logger_type="wandb"))
    with pytest.raises(ImportError, match="pip install wandb"):
        engine.run(1)


def test_any_object_with_log_is_a_logger():
    calls = []

    class Mine:
        def log(self, stats, tag, step):
            calls.append((tag, step))

    engine = pair(inner=Config(log_step=1), outer=Config(log_step=1))
    engine.config.logger_type = Mine()
    engine.run(2)
    assert calls == [("inner", 1), ("outer", 1), ("inner", 2), ("outer", 2)]


# --- progress and summary


def test_a_progress_bar_shows_the_losses():
    engine = pair()
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        engine.run(20, progress=True)
        engine.run(5, progress=True)
    last = shown.getvalue().split("\r")[-1]
    assert "25/25" in last and "inner" in last and "outer" in last and "it/s" in last


def test_a_progress_bar_reads_losses_twice_a_second_at_most():
    engine, reads = pair(), []
    engine._progress = lambda: reads.append(1) or {}
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        engine.run(500, progress=True)
    assert len(reads) <= 3 + 2 * (time.perf_counter() - start)


def test_summary_names_everything():
    text = str(pair(inner=Config(type="cg", unroll_steps=7)).summary())
    for word in ("outer", "inner", "SGD", "cg(iterations=1)", "7", "outer → inner → outer"):
        assert word in text


def test_run_checks_its_argument():
    with pytest.raises(ValueError, match="takes a whole number"):
        pair().run("all")


# --- defect 15: nothing waits for the device between two log entries

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}


class Calls(TorchFunctionMode):
    "Counts the Python calls that wait for a device"

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    "Counts the operations that wait for a device, wherever they are called from"

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reading = func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
        if reading and args[0].untyped_storage().nbytes() != torch.get_rng_state().numel():  # a generator's state, which is on the CPU with any device
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def reads(engine, iterations):
    "What waited for the device during `iterations` iterations"
    with Calls() as calls, Operations() as operations:
        for _ in range(2 * iterations):
            if engine.completed >= iterations and not engine._agenda:
                break
            while not engine.advance().kind == "descend" or engine._agenda:
                pass
    return calls.found + operations.found


@pytest.mark.parametrize("method", ["darts", "cg", "neumann", "sama"])
def test_defect_15_host_syncs(method, monkeypatch):
    for module in ("method", "darts"):
        monkeypatch.setattr(f"betty_nb.hypergradient.{module}.free_to_read", lambda tensor: False)  # as on a GPU
    engine, _ = ridge_program(method)
    for p in engine.problems:
        p.config.gradient_clipping = 1.0
    assert reads(engine, 50) == [] and engine.inner.steps == 50


def test_defect_15_host_syncs_are_seen_where_there_are_some():
    engine, _ = ridge_program("cg", log_step=10)
    engine.config.logger_type = type("Mine", (), {"log": lambda self, stats, tag, step: numbers(stats)})()
    assert reads(engine, 50).count("_local_scalar_dense") >= 5


# --- memory

GROWTH = """
import json, os, time, torch
from tests.programs import ridge_program
torch.set_num_threads(1)
page = os.sysconf("SC_PAGE_SIZE")
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * page / 2**20
found = {}
for method in ("darts", "cg"):
    engine, _ = ridge_program(method, n=5, dtype=torch.float32, unroll_steps=20)
    engine.run(2000)
    start, sizes = time.perf_counter(), [rss()]
    for _ in range(9):
        engine.run(2000)
        sizes.append(rss())
    found[method] = sizes, time.perf_counter() - start
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the size of a process is read from /proc")
def test_memory_stays_flat_over_20000_steps():
    done = subprocess.run([sys.executable, "-c", GROWTH], cwd=ROOT, env=child_env(), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for method, (sizes, seconds) in json.loads(done.stdout.splitlines()[-1]).items():
        print(f"{method}: MB after 2000, 4000, ... 20000 steps {[round(s, 1) for s in sizes]}, {seconds:.1f} s")
        assert sizes[-1] - sizes[0] < 1.0
