"""Looking never disturbs: whatever the method, and wherever it is interrupted or fails, the program is bit for bit as it was."""

import functools
import random
import signal
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader

from betty_nb.debugger import Debugger
from betty_nb.hypergradient import METHODS, make_method
from betty_nb.hypergradient.method import displaced
from betty_nb.optim import discard_closed
from betty_nb.undisturbed import Restoring, TorchModes, twice_differentiable, undisturbed
from tests.programs import bits, noisy_program, same


def ready(name, dtype=torch.float32):
    "A program with dropout, BatchNorm and Adam whose inner level fits the method, just before an upper update"
    debugger = Debugger(noisy_program(name, dtype=dtype))
    debugger.until("outer")
    return debugger


class Failure(Exception):
    pass


@pytest.fixture
def modes():
    "A function that asserts that torch is set as it was when the test began; whatever it finds, the tests after this one find torch so"
    before = TorchModes()

    def unchanged():
        discard_closed()  # torch may put such a mode back when it forgets the interrupt; it does nothing, and goes where the next one is entered
        assert vars(TorchModes()) == vars(before)

    yield unchanged
    before.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(METHODS))
def test_a_probe_leaves_no_trace(name, dtype):
    debugger = ready(name, dtype)
    before = bits(debugger.engine)
    method = make_method(name)
    try:
        debugger.engine.probe("outer", methods={"inner": method})
    except (RuntimeError, NotImplementedError) as error:  # an operation that torch does not have for this precision
        print(f"{name} {dtype}: {error}")
    assert same(bits(debugger.engine), before)


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "its own generator"])
def test_looking_before_the_first_batch_leaves_the_order_of_the_data(own):
    def drawn(look):
        torch.manual_seed(0)
        engine = noisy_program("cg")
        generator = torch.Generator().manual_seed(3) if own else None
        engine.inner.train_data_loader = DataLoader(engine.inner.train_data_loader.dataset, batch_size=20, shuffle=True, generator=generator)
        debugger = Debugger(engine)
        if look:
            debugger.hypergradient("outer"), debugger.constraining_sets("inner"), debugger.diagnose(seconds=0.5)
        debugger.step(4)
        return bits(engine)

    assert same(drawn(look=True), drawn(look=False))


@pytest.mark.parametrize("name", list(METHODS))
def test_an_exception_anywhere_in_a_training_step_leaves_no_trace(name):
    debugger = ready(name)
    before, inner = bits(debugger.engine), type(debugger.engine.inner)
    original, method, failed = inner.training_step, make_method(name), 0
    for at in range(1, 8):
        calls = []

        def failing(self, batch, calls=calls, at=at):
            loss = original(self, batch)
            calls.append(1)
            if len(calls) == at:
                raise Failure
            return loss

        inner.training_step = failing
        try:
            debugger.engine.probe("outer", methods={"inner": method})
        except Failure:
            failed += 1
        finally:
            inner.training_step = original
        assert same(bits(debugger.engine), before), f"the exception in pass {at}"
    assert failed, "no pass of the inner level took place, so nothing was tested"


@pytest.mark.parametrize(("context", "method"), [(displaced, "darts"), (displaced, "penalty"), (twice_differentiable, "cg"), (undisturbed, "cg"), (undisturbed, "darts")])
def test_an_interrupt_just_before_a_context_ends_leaves_no_trace(context, method, monkeypatch):
    "Python looks for an interrupt when it enters `__exit__`, and then nothing of it is run"
    debugger = ready(method)
    before, kernels, left = bits(debugger.engine), torch.backends.cuda.flash_sdp_enabled(), [1]

    def interrupted(self, *error):
        if left:
            left.pop()
            raise KeyboardInterrupt
        Restoring.__exit__(self, *error)

    monkeypatch.setattr(context, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        debugger.engine.probe("outer", methods={"inner": make_method(method)})
    assert not left and same(bits(debugger.engine), before)
    assert torch.backends.cuda.flash_sdp_enabled() == kernels


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals arrive in the main thread")
@pytest.mark.parametrize("name", list(METHODS))
def test_an_interrupt_at_a_random_moment_leaves_no_trace(name, modes):
    debugger = ready(name)
    before, method, rng = bits(debugger.engine), make_method(name), random.Random(0)
    probe = lambda: debugger.engine.probe("outer", methods={"inner": method})  # noqa: E731
    probe()
    start = time.perf_counter()
    probe()
    length, interrupted = time.perf_counter() - start, 0
    tries = 25 if length < 0.1 else 10

    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(tries):
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(1e-5, rng.random() * length))
                    probe()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)  # inside the outer try, since the alarm may ring before this line
            except (KeyboardInterrupt, RuntimeError) as error:
                if not isinstance(error, KeyboardInterrupt) and "KeyboardInterrupt" not in str(error):
                    raise  # torch wraps an interrupt that meets its own Python code inside a backward pass
                interrupted += 1
            modes()
            assert same(bits(debugger.engine), before)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert interrupted >= tries // 5, f"only {interrupted} of {tries} interrupts came in time"


def in_contexts_of_torch(act, at=0):
    """How often Python looks for an interrupt in `act()` inside torch's own contexts, and what they are called; the look number `at` finds one.

    Python looks where a function is called, and where one of C returns."""
    files, looks = ("grad_mode.py", "_vmap_internals.py", "forward_ad.py", "autocast_mode.py", "overrides.py", "_python_dispatch.py", "contextlib.py"), []

    def profile(frame, event, arg):
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
            looks.append(frame.f_code.co_filename)
            if len(looks) == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    old = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error, KeyboardInterrupt) and "KeyboardInterrupt" not in str(error):
            raise
        assert at, "nothing was to interrupt it"
    finally:
        sys.setprofile(old)
    return looks


@pytest.mark.parametrize("name", list(METHODS))
def test_an_interrupt_inside_a_context_of_torch_leaves_no_trace(name, modes):
    debugger = ready(name)
    before, method = bits(debugger.engine), make_method(name)
    probe = lambda: debugger.engine.probe("outer", methods={"inner": method})  # noqa: E731
    probe()
    looks = in_contexts_of_torch(probe)
    places = random.Random(0).sample(range(1, len(looks) + 1), min(len(looks), 40))
    for at in places:
        assert len(in_contexts_of_torch(probe, at)) == at
        modes()
        assert same(bits(debugger.engine), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupt_inside_a_context_of_torch_ends_a_run_or_a_step_with_torch_as_it_was(precision, modes):
    for move in ("run", "step"):
        engine = noisy_program("unroll")
        for p in engine.problems:
            p.config.precision = precision
        debugger = Debugger(engine) if move == "step" else None
        go = functools.partial(debugger.step, 8) if debugger else functools.partial(engine.run, 3)
        looks = in_contexts_of_torch(go)
        assert any(name.endswith("autocast_mode.py") for name in looks) == (precision == "bf16")
        interrupted = 0
        for at in random.Random(0).sample(range(1, len(looks) // 2), 25):
            interrupted += len(in_contexts_of_torch(go, at)) == at
            modes()
            assert not engine.running
        assert interrupted == 25


def test_a_program_that_was_interrupted_when_its_step_was_over_can_go_on(monkeypatch):
    debugger = ready("cg")
    rest, left = debugger.timeline.rest, [1]

    def interrupted():
        if left:
            left.pop()
            raise KeyboardInterrupt
        rest()

    monkeypatch.setattr(debugger.timeline, "rest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        debugger.step()
    debugger.step()
    assert not left and not debugger.running
