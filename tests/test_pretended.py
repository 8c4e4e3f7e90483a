"""Every method on a pretended device: nothing is mixed with tensors of the CPU, nothing waits for the device, and the numbers are those of the CPU."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.debugger import Debugger
from betty_nb.distributed import ALONE
from betty_nb.hypergradient import CG, METHODS, Unroll, make_method
from tests.pretend import DEVICE, Generator, Pretend, There, moved, moved_module
from tests.programs import BOTH, Vector


def program(method, place=lambda module: module, make=torch.optim.Adam, roll_back=False, **config):
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    y = (x.sum(1, keepdim=True) > 0).double()
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Softplus(), torch.nn.Linear(6, 1)).double()
    net, decay = place(net), place(Vector(2, -3.0).double())

    class Inner(IterativeProblem if make_method(method).serves == "iterative" else ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            loss = F.binary_cross_entropy_with_logits(self.module(x), y)
            return loss + self.outer().exp().mean() * sum(p.square().sum() for p in self.module.parameters())

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return F.binary_cross_entropy_with_logits(self.inner(x), y)

    batches = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20)]
    inner = Inner("inner", Config(type=method, unroll_steps=3, **config), net, make(net.parameters(), lr=0.05), train_data_loader=batches)
    outer = Outer("outer", None, decay, torch.optim.Adam(decay.parameters(), lr=0.05), train_data_loader=[(x[40:], y[40:])])
    return Engine([outer, inner], EngineConfig(train_iters=1000, strategy="cpu", roll_back=roll_back), BOTH)


@pytest.fixture
def pretended(monkeypatch):
    "A context in which engines find the pretended device"

    @contextmanager
    def context():
        with monkeypatch.context() as patch, Pretend() as device:
            patch.setattr(Engine, "_find_device", lambda engine: (ALONE, DEVICE))
            patch.setattr(torch, "Generator", Generator)
            yield device

    return context


def numbers(engine):
    tensors = [p.detach() for q in engine.problems for p in q.module.parameters()]
    return torch.cat([(t.held if isinstance(t, There) else t).reshape(-1) for t in tensors])


def run(engine):
    engine.run(6)
    Pretend.forget()
    for _ in range(30):
        engine.advance()
    return engine


WAITING = ("exact", "nystrom")  # they factorize a matrix
CASES = {method: dict(method=method) for method in METHODS if method != "forward_mode"}  # torch crashes where a dual number meets a dispatch mode
CASES |= {
    "cg, SGD": dict(method="cg", make=torch.optim.SGD),
    "unroll, SGD": dict(method="unroll", make=torch.optim.SGD),
    "unroll, RMSprop": dict(method="unroll", make=torch.optim.RMSprop),
    "sama, AdamW": dict(method="sama", make=torch.optim.AdamW),
    "truncated": dict(method=Unroll(truncate=2)),
    "repeated": dict(method=Unroll(graph_mb=0)),
    "warm start": dict(method=CG(warm_start=True)),
    "clipped, accumulated": dict(method="cg", gradient_clipping=1.0, gradient_accumulation=2),
    "unroll, clipped, accumulated": dict(method="unroll", gradient_clipping=1.0, gradient_accumulation=2),
    "roll_back": dict(method="cg", roll_back=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_mixes_nothing_and_waits_for_nothing(name, pretended):
    here = run(program(**CASES[name]))
    with pretended() as device:
        there = run(program(place=moved_module, **CASES[name]))
        waits = list(device.waits)
    assert torch.allclose(numbers(there), numbers(here), rtol=1e-9, atol=1e-12)
    assert bool(waits) == (name in WAITING), waits


def test_only_logged_steps_wait(pretended):
    with pretended() as device:
        engine = run(program("cg", moved_module, log_step=5))
    assert len(device.waits) == sum(engine.inner.count >= n > 6 for n in range(0, 100, 5))


@pytest.mark.parametrize("method", ["cg", "sama", "unroll"])
def test_looking_and_going_back_mixes_nothing(method, pretended):
    with pretended():
        debugger = Debugger(program(method, moved_module))
        debugger.step(12)
        before = numbers(debugger.engine)
        record = debugger.hypergradient("outer")
        debugger.compare("outer", ["unroll"] if method == "unroll" else None, seconds=0)
        debugger.constraining_sets("outer")
        assert str(record) and debugger.diagnose(seconds=2).summary()
        assert torch.equal(numbers(debugger.engine), before)
        debugger.step(5)
        debugger.back(5)
        assert torch.equal(numbers(debugger.engine), before)


def test_a_mixture_and_a_wait_are_seen():
    with Pretend() as device:
        x = moved(torch.ones(3))
        with pytest.raises(RuntimeError, match="same device: aten.add.Tensor was given some on lazy:0 and some on the cpu"):
            x + torch.ones(3)
        assert not device.waits and (x + torch.tensor(1.0)).device == DEVICE
        assert x.sum().item() == 3 and x.cpu().device.type == "cpu" and len(device.waits) == 2
