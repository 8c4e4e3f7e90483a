"""The same program on a GPU; skipped where torch finds none."""

import pytest
import torch

from betty_nb import Config, EngineConfig
from betty_nb.app.demo import breast_cancer_program
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import Unroll
from betty_nb.optim import quick_step
from tests.programs import bits, noisy_program, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def program(strategy, method="cg"):
    return breast_cancer_program(Config(type=method, unroll_steps=5), EngineConfig(strategy=strategy), dtype=torch.float64)


def test_the_gpu_gives_the_hypergradient_of_the_cpu():
    found = {}
    for strategy in ("cpu", "gpu"):
        engine = program(strategy, "exact")
        engine.run(40)
        assert engine.inner.module.weight.device.type == ("cuda" if strategy == "gpu" else "cpu")
        found[strategy] = engine.probe("outer").total[0].cpu()
    assert ((found["gpu"] - found["cpu"]).norm() / found["cpu"].norm()).item() < 1e-8


def test_looking_and_going_back_on_the_gpu():
    debugger = Debugger(program("gpu"))
    debugger.step(12)
    before = bits(debugger.engine)
    debugger.hypergradient("outer")
    comparison = debugger.compare("outer", seconds=0)
    assert same(bits(debugger.engine), before)
    assert min(r.error for r in comparison.rows if r.error is not None) < 1e-6
    debugger.step(8)
    debugger.back(8)
    assert same(bits(debugger.engine), before)


def test_a_run_waits_for_the_gpu_at_its_end_only():
    engine = program("gpu")
    engine.run(10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_made_with_their_graph_on_the_gpu():
    found = {}
    for name, method in {"made": Unroll(), "repeated": Unroll(graph_mb=0)}.items():
        engine = noisy_program(method, strategy="gpu", dtype=torch.float64, gradient_clipping=0.0)
        torch.manual_seed(1)
        engine.run(7)
        assert (engine.inner.path.stretches[-1].live is not None) == (name == "made")
        while engine.next_action.kind != "hypergradient":
            engine.advance()
        found[name] = engine.probe("outer").total[0]
    assert ((found["made"] - found["repeated"]).norm() / found["repeated"].norm()).item() < 1e-8


def test_steps_made_with_their_graph_wait_for_the_gpu_at_the_end_only():
    engine = noisy_program("unroll", strategy="gpu", gradient_clipping=0.0)
    engine.run(10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            if engine.next_action.kind == "draw":  # a loader may copy from pageable memory
                torch.cuda.set_sync_debug_mode("default")
                engine.advance()
                torch.cuda.set_sync_debug_mode("error")
            else:
                engine.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["cg", "darts"])
def test_compiled_levels_on_the_gpu(method):
    found = {}
    for compile in (False, True):
        engine = program("gpu", method)
        engine.inner.config.compile = compile and "now"
        engine.run(20)
        found[compile] = torch.cat([p.detach().reshape(-1) for q in engine.problems for p in q.parameters()])
    assert engine.inner.compiled.seconds > 0
    assert torch.allclose(found[True], found[False], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["cg", "darts"])
def test_cuda_graphs_give_the_numbers_of_the_usual_way(method):
    from torch._dynamo.utils import counters

    found = {}
    counters.clear()
    for graphs in (False, True):
        engine = program("gpu", method)
        engine.inner.config.compile, engine.inner.config.cuda_graphs = graphs and "now", graphs
        engine.run(40)
        found[graphs] = torch.cat([p.detach().reshape(-1) for q in engine.problems for p in q.parameters()])
    assert engine.inner.compiled.programs["step"].graphs and engine.inner.compiled.programs["step"].open
    assert not counters["inductor"]["cudagraph_skips"], "the step was compiled, but not recorded"
    assert torch.allclose(found[True], found[False], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_a_quick_step_on_the_gpu_has_the_bits_of_the_optimizer(make, options):
    torch.manual_seed(0)
    start = [torch.randn(n, device="cuda") for n in (3, 70_000, 5)]
    theirs, ours = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    a, b = make(theirs, lr=0.1, **options), make(ours, lr=0.1, **options)
    for step in range(5):
        for p, q in zip(theirs, ours):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        if not step:
            b.step()  # the first one makes the state
        else:
            assert quick_step(b)
        assert same(theirs, ours)
