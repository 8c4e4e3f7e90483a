"""The same program on a GPU; skipped where torch finds none."""

import pytest
import torch

from betty_nb import Config, EngineConfig
from betty_nb.app.demo import breast_cancer_program
from betty_nb.debugger import Debugger
from tests.programs import bits, same

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
