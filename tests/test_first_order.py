"""Methods that take first derivatives only: darts, sama, penalty, evolution, reinforce. Numbers of the defects are those of Betty that they must not have."""

import warnings
from unittest import mock

import pytest
import torch

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import Darts, Evolution, Exact, Linearization, Penalty, Reinforce, Sama
from betty_nb.hypergradient.method import flatten, pass_back
from tests.programs import BOTH, Vector, bits, noisy_program, pair, same

FIRST_ORDER = {
    "darts": Darts(),
    "sama": Sama(),
    "penalty": Penalty(iterations=4),
    "evolution": Evolution(samples=2, steps=2),
    "reinforce": Reinforce(samples=2, steps=2),
}
first_order = pytest.mark.parametrize("method", FIRST_ORDER.values(), ids=FIRST_ORDER)


def at_outer(method, **kwargs):
    "A program with dropout, BatchNorm and Adam, stopped just before a hypergradient"
    debugger = Debugger(noisy_program(method, **kwargs))
    debugger.until("outer")
    return debugger


def two_levels(config=None):
    "The program `pair`, its levels away from zero"
    engine = pair(inner=config)
    torch.manual_seed(0)
    for level in engine.problems:
        torch.nn.init.uniform_(level.module.value, 0.5, 1.5)
    return engine


def before_hypergradient(engine):
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    return engine


def weights(engine, level="inner"):
    return [p.detach().clone() for p in engine.level(level).module.parameters()]


# Defect 5: weights perturbed in place and restored by arithmetic, two dropout masks, BatchNorm counting along


@first_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_defect_5_weights_do_not_drift(method, dtype):
    torch.manual_seed(0)
    theta = torch.randn(50).to(dtype).requires_grad_()
    x = torch.randn(50).to(dtype).requires_grad_()
    level = Linearization(lambda: ((theta - x.tanh()) ** 2).mean(), [theta], {"outer": [x]}, "inner", pair().level("inner"))
    level.problem.optimizer = torch.optim.Adam([theta])
    level.problem.optimizer.state[theta] = {"step": torch.tensor(3.0), "exp_avg": theta.detach() * 0.1, "exp_avg_sq": theta.detach().square()}
    before = theta.detach().clone(), x.detach().clone()
    for _ in range(100):
        parts, _ = method.pull_back(level, torch.randn(50).to(dtype))
    assert torch.equal(theta, before[0]) and torch.equal(x, before[1])
    assert parts["outer"][0].dtype == dtype and parts["outer"][0].isfinite().all()


@first_order
@pytest.mark.parametrize("call", [1, 2, 3, 4, 7])
def test_defect_5_an_interrupt_leaves_everything_in_place(method, call):
    debugger = at_outer(method)
    engine, inner = debugger.engine, debugger.engine.level("inner")
    before, calls, step = bits(engine), [], inner.training_step

    def interrupted(batch):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(batch)

    inner.training_step = interrupted
    try:
        engine.probe("outer")
        assert len(calls) < call
    except KeyboardInterrupt:
        pass
    inner.training_step = step
    assert same(bits(engine), before)


@first_order
def test_defect_5_a_training_hypergradient_leaves_the_lower_level_alone(method):
    debugger = at_outer(method)
    inner = debugger.engine.level("inner")
    before, counted = weights(debugger.engine), inner.module[1].num_batches_tracked.item()
    debugger.step()
    assert debugger.engine.level("outer").trainable_parameters()[0].grad is not None
    assert same(weights(debugger.engine), before)
    assert inner.module[1].num_batches_tracked == counted + 1, "the pass of the upper loss, and none of the method's own"


@pytest.mark.parametrize("method", [Darts(), Sama()], ids=["darts", "sama"])
def test_defect_5_both_passes_share_the_dropout_mask(method):
    debugger = at_outer(method)
    inner, masks = debugger.engine.level("inner"), []
    debugger.engine.level("inner").module[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    debugger.engine.level("outer").training_step = lambda batch: inner.module[0].weight.square().sum() + 0 * debugger.engine.level("outer").module().sum()
    debugger.engine.probe("outer")
    assert len(masks) == (2 if method == Darts() else 3), "sama needs the level's own gradient, too"
    assert all(torch.equal(mask, masks[0]) for mask in masks)


# Defect 6: the hidden training of the lower weights on the upper loss


@pytest.mark.parametrize("name", ["darts", "sama"])
def test_defect_6_the_multitask_shift_is_off_by_default(name):
    engine = before_hypergradient(two_levels(Config(type=name)))
    assert not engine.level("inner").method.multitask
    before = weights(engine)
    engine.advance()
    assert same(weights(engine), before)


@pytest.mark.parametrize(
    "config, alpha",
    [
        (Config(type="darts", darts_multitask=True), 0.01),
        (Config(type="darts", darts_multitask=True, darts_alpha=0.25), 0.25),
        (Config(type="sama", sama_multitask=True), 1.0),
        (Config(type=Sama(alpha=0.5, multitask=True)), 0.5),
    ],
)
def test_defect_6_when_asked_for_it_moves_the_level_by_the_documented_amount(config, alpha):
    engine = before_hypergradient(two_levels(config))
    inner, outer = engine.level("inner"), engine.level("outer")
    before = weights(engine)
    v = torch.autograd.grad(outer.loss(), inner.trainable_parameters())[0]
    engine.probe("outer")
    assert same(weights(engine), before), "a probe must not move the level"
    plain = before_hypergradient(two_levels(Config(type=type(inner.method)(alpha=alpha))))
    engine.advance(), plain.advance()
    assert torch.equal(weights(engine)[0], before[0] - alpha / v.norm() * v), (weights(engine)[0] - before[0], alpha / v.norm() * v)
    assert torch.equal(outer.module.value.grad, plain.level("outer").module.value.grad), "the hypergradient itself is the same"


def test_defect_6_the_shift_is_undone_by_going_back():
    debugger = at_outer(Darts(multitask=True, alpha=0.1))
    before, state = weights(debugger.engine), bits(debugger.engine)
    debugger.hypergradient("outer")
    assert same(bits(debugger.engine), state)
    debugger.step()
    shifted = bits(debugger.engine)
    assert not same(weights(debugger.engine), before)
    debugger.back()
    assert same(weights(debugger.engine), before)
    debugger.step()
    assert same(bits(debugger.engine), shifted)


# Defect 8: SAMA's choice by class name, and zero at the first step


@pytest.mark.parametrize("optimizer", ["Adamax", "NAdam", "RAdam", "Adadelta", "ASGD", "Rprop"])
def test_defect_8_sama_refuses_an_optimizer_it_does_not_know(optimizer):
    engine = pair(inner=Config(type="sama"))
    inner = engine.level("inner")
    inner.optimizer = getattr(torch.optim, optimizer)(inner.module.parameters())
    assert f"not that of {optimizer}" in Sama().refuses(inner)
    with pytest.raises(ValueError, match=f"'inner': sama knows the update of .*, not that of {optimizer}"):
        engine.run(1)
    inner.config.type = "darts"
    with pytest.raises(ValueError, match="sama knows the update of"):
        Debugger(engine).swap("inner", "sama")


def test_defect_8_a_subclass_may_have_another_update():
    class Mine(torch.optim.Adam):
        pass

    engine = pair()
    engine.level("inner").optimizer = Mine(engine.level("inner").module.parameters())
    assert "not that of Mine" in Sama().refuses(engine.level("inner"))


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "Adagrad", "SGD"])
def test_defect_8_sama_is_not_zero_at_the_first_step(optimizer):
    engine = two_levels(Config(type="sama"))
    inner = engine.level("inner")
    inner.optimizer = getattr(torch.optim, optimizer)(inner.module.parameters(), lr=0.01)
    fresh = engine.probe("outer")
    engine.advance(), engine.advance()
    once = engine.probe("outer")
    exact = engine.probe("outer", methods={"inner": Exact()})
    for result in (fresh, once):
        assert result.indirect[0].abs().min() > 1e-4 * exact.indirect[0].abs().max()
    assert fresh.passages["inner"].solve.status == ("fixed" if optimizer == "SGD" else "first step")
    assert once.passages["inner"].solve.status == "fixed"


def test_sama_counts_the_rates_of_groups():
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    x = torch.ones(1, requires_grad=True)
    problem = pair().level("inner")
    problem.optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.01}], lr=0.1)
    problem.module = None
    w = Sama().pull_back(Linearization(lambda: (x * (a + b) ** 2).sum(), [a, b], {"outer": [x]}, "inner", problem), torch.ones(2))[1].vector
    assert torch.allclose(w, torch.tensor([1.0, 0.1]))


# The penalty method: no second derivative, and its warm start


@first_order
def test_no_second_derivative_is_ever_taken(method):
    engine = at_outer(method).engine
    graphs = []

    def counted(*args, **options):
        graphs.append(options.get("create_graph", False))
        return pass_back(*args, **options)

    with mock.patch("betty_nb.hypergradient.method.pass_back", counted):
        result = engine.probe("outer")
    assert len(graphs) >= 3 and not any(graphs)
    assert result.passages["inner"].hvps == 0


def test_the_copy_is_kept_in_training_and_left_alone_in_probes():
    debugger = at_outer(Penalty(iterations=3))
    engine, inner = debugger.engine, debugger.engine.level("inner")
    assert inner.solutions == {}
    debugger.hypergradient("outer"), debugger.compare("outer", methods=["penalty", "darts"], seconds=0)
    assert inner.solutions == {}
    debugger.step()
    kept = inner.solutions["outer", "penalty"].clone()
    debugger.until("outer")
    debugger.hypergradient("outer"), debugger.compare("outer", methods=["penalty", "darts"], seconds=0)
    assert torch.equal(inner.solutions["outer", "penalty"], kept)
    debugger.step()
    assert not torch.equal(inner.solutions["outer", "penalty"], kept)
    inner.reset()
    assert inner.solutions == {}
    assert engine.level("outer").solutions == {}


def test_the_copy_travels_with_the_timeline():
    debugger = Debugger(noisy_program(Penalty(iterations=3)))
    trail = []
    for _ in range(40):
        debugger.step()
        trail.append(bits(debugger.engine) + [*debugger.engine.level("inner").solutions.values()])
    debugger.back(25)
    for i in range(15, 40):
        debugger.step()
        assert same(bits(debugger.engine) + [*debugger.engine.level("inner").solutions.values()], trail[i])


def test_the_warm_start_helps_a_level_that_moves_slowly():
    def residual(warm_start):
        engine = two_levels(Config(type=Penalty(iterations=1, rate=0.15, warm_start=warm_start)))
        inner = engine.level("inner")
        scales = torch.tensor([0.2, 1.0, 3.0])
        inner.training_step = lambda batch: (scales * (inner.module() - inner.outer()) ** 2).sum()
        engine.run(30)
        return engine.probe("outer").passages["inner"].solve.residual

    assert residual(True) < 0.3 * residual(False)


# Sampling


@pytest.mark.parametrize("cls", [Evolution, Reinforce])
def test_sampling_is_unbiased_within_its_standard_error(cls):
    torch.manual_seed(1)
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    B, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    level = Linearization(lambda: 0.5 * theta @ theta - theta @ B @ x, [theta], {"outer": [x]})
    runs = [cls(samples=6, steps=1, rate=1.0, seed=seed).pull_back(level, v) for seed in range(150)]
    off = torch.stack([parts["outer"][0] for parts, _ in runs]) - B.T @ v
    z = off.mean(0) / (off.std(0) / 150**0.5)
    assert z.square().sum() < 12.8, "chi-squared with 3 degrees of freedom, 0.5 %"
    reported = torch.stack([solve.standard_error for _, solve in runs]).square().mean().sqrt()
    assert 0.8 < reported / off.norm(dim=1).square().mean().sqrt() < 1.25


@pytest.mark.parametrize("method", ["evolution", "reinforce"])
def test_sampling_draws_other_directions_at_another_step(method):
    engine = at_outer(method).engine
    first, again = engine.probe("outer").indirect[0], engine.probe("outer").indirect[0]
    assert torch.equal(first, again)
    engine.level("inner").steps += 1
    assert not torch.equal(engine.probe("outer").indirect[0], first)


# All of them, in a program


@first_order
def test_the_direction_is_that_of_the_exact_hypergradient(method):
    "One upper parameter that the lower level follows, well conditioned: each method must at least find the sign and order of magnitude"
    torch.manual_seed(0)
    inner, outer = Vector(4), Vector(4, 0.5)
    target = torch.tensor([1.0, -1.0, 2.0, 0.5])

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            return 0.5 * (self.module() - self.outer()).square().sum() + 0.01 * self.module().pow(4).sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return (self.inner() - target).square().sum()

    accurate = {"evolution": Evolution(samples=60), "reinforce": Reinforce(samples=120)}.get(method.name, type(method)())
    levels = [
        Outer("outer", Config(), outer, torch.optim.SGD(outer.parameters(), lr=0.1), train_data_loader=[0]),
        Inner("inner", Config(type=accurate, unroll_steps=20), inner, torch.optim.SGD(inner.parameters(), lr=0.3), train_data_loader=[0]),
    ]
    engine = Engine(levels, EngineConfig(strategy="cpu"), BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(20)
    found, exact = flatten(engine.probe("outer").indirect), flatten(engine.probe("outer", methods={"inner": Exact()}).indirect)
    cosine = found @ exact / found.norm() / exact.norm()
    assert cosine > {"evolution": 0.9, "reinforce": 0.9}.get(method.name, 0.99)
    if method.name == "penalty":
        assert (found - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("method", [Penalty(iterations=20, sigma=1e-4), Evolution(samples=20, steps=6)], ids=["penalty", "evolution"])
def test_a_middle_level_answers_with_its_total_gradient(method):
    "top > low < mid < top: the optimum of `mid` depends on what `low` answers, which a copy of `mid` must take along"
    torch.manual_seed(0)
    n = 3
    A, B, C = (torch.randn(n, n, dtype=torch.float64) / n for _ in range(3))
    A, B = A @ A.T + torch.eye(n), B @ B.T + torch.eye(n)

    class Low(ImplicitProblem):
        def training_step(self):
            low = self.module()
            return 0.5 * low @ A @ low - low @ (self.top() + 0.8 * C @ self.mid())

    class Mid(ImplicitProblem):
        def training_step(self):
            mid = self.module()
            return 0.5 * mid @ B @ mid - mid @ self.low() + 0.3 * self.low().square().sum()

    class Top(ImplicitProblem):
        def training_step(self):
            return (self.mid() - 1).square().sum() + 0.1 * self.module().square().sum()

    def make(cls, config):
        module = Vector(n).double()
        torch.nn.init.normal_(module.value)
        return cls(cls.__name__.lower(), config, module, torch.optim.SGD(module.parameters(), lr=0.1))

    levels = [make(Top, Config()), make(Mid, Config(type="exact", hessian="total")), make(Low, Config(type="exact"))]
    edges = {"u2l": {"top": ["low"], "mid": ["low"]}, "l2u": {"low": ["mid"], "mid": ["top"]}}
    engine = Engine(levels, EngineConfig(strategy="cpu"), edges)
    exact = engine.probe("top")
    found = engine.probe("top", methods={"mid": method, "low": Exact()})
    engine.level("mid").config.hessian = "direct"
    direct = engine.probe("top")

    def off(result):
        return ((result.indirect[0] - exact.indirect[0]).norm() / exact.indirect[0].norm()).item()

    error = found.passages["mid"].solve.standard_error
    if error is None:
        assert off(found) < 1e-4 < off(direct)
    else:
        assert off(found) < 3 * error / exact.indirect[0].norm()
