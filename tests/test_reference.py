"""The reference that hypergradients are compared with: never longer than it may take, in pieces, and somebody can always get in between."""

import threading
import time

import pytest
import torch

from betty_nb import Debugger
from betty_nb.debugger.reference import plans
from betty_nb.hypergradient import Exact
from betty_nb.hypergradient.method import flatten
from tests.programs import bits, chain, same

EXACT = dict(reference="exact")


pytestmark = pytest.mark.usefixtures("one_thread")


def debugged(*args, **options):
    debugger = Debugger(chain(*args, **options))
    debugger.step(5)
    return debugger


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


@pytest.mark.parametrize("levels", [4, 8])
def test_what_would_take_too_long_is_not_begun(levels):
    debugger = debugged(levels)
    before = bits(debugger.engine)
    record, took = seconds(lambda: debugger.hypergradient("level0"))
    assert took < 3 and record.reference == "exact, direct Hessians" and record.error < 1
    assert "Exact would take" in record.note and "debugger.hypergradient('level0', reference='exact')" in record.summary()
    comparison, took = seconds(lambda: debugger.compare("level0", ["exact", "darts", "neumann"], seconds=0.05, budget=10))
    assert took < 10 and not comparison.left_out and comparison.reference == "exact, direct Hessians"
    assert comparison.rows[1].method == "exact" and comparison.rows[1].error < 1e-5 and "debugger.compare('level0'" in repr(comparison)
    assert same(bits(debugger.engine), before)
    print(f"{levels} levels: {comparison.note}")


def test_what_is_asked_for_is_exact():
    debugger = debugged(4, 3, dtype=torch.float64)
    debugger.reference_seconds = 1e-9
    assert debugger.hypergradient("level0").reference is None
    record = debugger.hypergradient("level0", **EXACT)
    methods = {j: Exact() for j in debugger.engine.graph.below("level0")}
    whole = flatten(debugger.engine.probe("level0", methods=methods, hessian="total").indirect)
    own = flatten(debugger.engine.probe("level0").indirect)
    assert record.reference == "exact" and abs(record.error - ((own - whole).norm() / whole.norm()).item()) < 1e-6
    assert debugger.compare("level0", ["darts"], seconds=0, **EXACT).reference == "exact"
    with pytest.raises(ValueError, match="reference must be True, False or 'exact', got 'cg'"):
        debugger.compare("level0", reference="cg")


def test_the_estimate_is_of_the_right_size():
    debugger = debugged(4, 12)
    (plan,) = [p for p in plans(debugger, "level0") if p.name == "exact"]
    _, took = seconds(lambda: debugger.hypergradient("level0", **EXACT))
    print(f"estimated {plan.cost.seconds:.1f} s for {plan.cost.solves} solves, took {took:.1f} s")
    assert took / 5 < plan.cost.seconds < 5 * took


def test_pause_and_steps_get_in_between():
    debugger = debugged(4)  # exact: most of a minute
    before = bits(debugger.engine)
    threading.Timer(0.5, debugger.pause).start()
    record, took = seconds(lambda: debugger.hypergradient("level0", **EXACT))
    assert took < 3 and record.reference is None and "interrupted" in record.note and same(bits(debugger.engine), before)
    found, waited = [], []
    looking = threading.Thread(target=lambda: found.append(debugger.compare("level0", ["darts"], **EXACT)))
    looking.start()
    time.sleep(0.5)
    waited.append(seconds(lambda: debugger.constraining_sets("level0"))[1])  # who only looks disturbs nobody
    assert looking.is_alive()
    waited.append(seconds(debugger.step)[1])
    looking.join(10)
    print(f"waited {waited[0]:.2f} s to look, {waited[1]:.2f} s to step")
    assert max(waited) < 2 and "the program has moved on" in found[0].note and found[0].left_out == ("darts(alpha=0.01)",)
    debugger.run(3).wait(30)
    debugger.close()


def test_a_breakpoint_on_agreement_takes_what_is_affordable():
    debugger = debugged(8)
    debugger.break_on("agreement", "level0", cosine=0.999999)
    debugger.run(50).wait(60)
    assert "against exact, direct Hessians" in debugger.stopped_by.text
