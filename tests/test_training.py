"""How a level is trained: precision, rolling back, schedulers, parameter groups, callbacks, batches; against loops written by hand in plain torch."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch.optim import lr_scheduler as lrs

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import METHODS, Darts, Penalty, make_method
from betty_nb.problems.problem import to_device
from tests.programs import BOTH, Vector, bits, noisy_program, same


def cancer(n=120, dtype=torch.float32):
    "Training and validation data: standardised features of tumours, and whether they are benign"
    x, y = (torch.as_tensor(a) for a in load_breast_cancer(return_X_y=True))
    x, y = ((x - x.mean(0)) / x.std(0)).to(dtype), y.to(dtype)[:, None]
    return (x[:n], y[:n]), (x[n : 2 * n], y[n : 2 * n])


def fixed(*parts):
    "A loader that gives the same batches in the same order"
    return list(parts)


# 1 Precision


def reweighting(method="cg", precision="fp32", seed=0, steps=30, outer_scale=1.0, scheduler=None, **options):
    "Logistic regression in which each example has a weight, learned by the validation loss"
    torch.manual_seed(seed)
    train, valid = cancer(60)
    net, weights = torch.nn.Linear(30, 1), Vector(60)

    class Inner(IterativeProblem if make_method(method).serves == "iterative" else ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            losses = F.binary_cross_entropy_with_logits(self.module(x), y, reduction="none").squeeze(1)
            return (self.outer().exp() * losses).mean() + 0.3 * self.module.weight.square().sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return outer_scale * F.binary_cross_entropy_with_logits(self.inner(x), y)

    sgd = torch.optim.SGD(net.parameters(), lr=0.2)
    config = Config(type=method, unroll_steps=steps, precision=precision, **options)
    inner = Inner("inner", config, net, sgd, scheduler and scheduler(sgd), fixed(train))
    scale = {k: v for k, v in options.items() if k == "initial_dynamic_scale"}
    outer = Outer(
        "outer",
        Config(precision=precision, **scale),
        weights,
        torch.optim.SGD(weights.parameters(), lr=0.1),
        train_data_loader=fixed(valid),
    )
    return Engine([outer, inner], EngineConfig(strategy="cpu", train_iters=1000), BOTH)


def ready(engine):
    "`engine` just before the first hypergradient"
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    return engine


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", list(METHODS))
def test_hypergradients_in_half_precision_agree_with_those_in_single(name):
    steps = 2 if name == "forward_mode" else 30  # it takes 60 passes
    wide = {"darts": Darts(alpha=0.5), "penalty": Penalty(sigma=0.2)}  # short displacements are rounded away
    wide.update({sampled: make_method(sampled, sigma=0.5) for sampled in ("evolution", "reinforce")})
    method = wide.get(name, make_method(name))
    reference = ready(reweighting(method, steps=steps)).probe("outer").total[0]
    errors = {p: relative(ready(reweighting(method, p, steps=steps)).probe("outer").total[0], reference) for p in ("bf16", "fp16")}
    print(name, errors)
    sampled = 15 if name in ("evolution", "reinforce") else 1  # differences of answers
    assert errors["bf16"] < 1.5 * sampled * torch.finfo(torch.bfloat16).eps
    assert errors["fp16"] < 3 * sampled * torch.finfo(torch.float16).eps
    assert 0 < errors["fp16"] < errors["bf16"], "half precision was not used"


@pytest.mark.parametrize("name", ["cg", "unroll", "darts", "sama"])
def test_every_pass_of_an_autocast_level_is_in_its_precision(name):
    engine, seen = reweighting(name, "bf16"), []
    engine.inner.module.register_forward_hook(lambda module, args, out: seen.append((out.dtype, torch.is_autocast_enabled("cpu"))))
    ready(engine)
    engine.probe("outer")
    assert set(seen) == {(torch.bfloat16, True)} and len(seen) > 31
    assert engine.inner.loss().requires_grad and engine.inner.training_step_exec(engine.inner.batch).isfinite()
    assert not torch.is_autocast_enabled("cpu") and all(p.dtype == torch.float32 for p in engine.inner.parameters())


def test_the_total_hessian_in_half_precision():
    def program(precision):
        torch.manual_seed(0)
        (x, y), (xv, yv) = cancer(60)
        net, decay, top = torch.nn.Linear(30, 1), Vector(1, -1.0), Vector(1, 0.5)

        class Low(ImplicitProblem):
            def training_step(self):
                return F.binary_cross_entropy_with_logits(self.module(x), y) + self.mid().exp().sum() * self.module.weight.square().sum()

        class Mid(ImplicitProblem):
            def training_step(self):
                return F.binary_cross_entropy_with_logits(self.low(xv), yv) + 0.5 * (self.mid() - self.top()).square().sum()

        class Top(ImplicitProblem):
            def training_step(self):
                return (self.mid() + 2).square().sum()

        sgd = torch.optim.SGD
        low = Low("low", Config(type="exact", unroll_steps=100, precision=precision), net, sgd(net.parameters(), lr=0.1))
        mid = Mid("mid", Config(type="exact", hessian="total", unroll_steps=5, precision=precision), decay, sgd(decay.parameters(), lr=0.1))
        engine = Engine([low, mid, Top("top", None, top, sgd(top.parameters(), lr=0.1))], EngineConfig(strategy="cpu"),
                        {"u2l": {"top": ["mid"], "mid": ["low"]}, "l2u": {"low": ["mid"], "mid": ["top"]}})  # fmt: skip
        while engine.next_action.level != "top":
            engine.advance()
        return engine.probe("top").total[0]

    reference = program("fp32")
    assert relative(program("bf16"), reference) < 0.1 and relative(program("fp16"), reference) < 0.02


@pytest.mark.parametrize("method", ["exact", "unroll", "darts"])
def test_small_hypergradients_do_not_vanish_in_fp16(method):
    method = Darts(alpha=0.5) if method == "darts" else method
    scale = 1e-7  # the derivatives of the upper loss in the logits are about 1e-9, which float16 takes for zero
    reference = ready(reweighting(method, outer_scale=scale)).probe("outer").total[0]
    unscaled = ready(reweighting(method, "fp16", outer_scale=scale, initial_dynamic_scale=1.0)).probe("outer").total[0]
    scaled = ready(reweighting(method, "fp16", outer_scale=scale, initial_dynamic_scale=2.0**16)).probe("outer").total[0]
    assert reference.abs().max() < 1e-8 and not unscaled.any(), "without scaling there is nothing left"
    assert relative(scaled, reference) < 0.01


def test_a_scale_that_overflows_in_a_hypergradient_is_lowered_for_it():
    reference = ready(reweighting("exact")).probe("outer").total[0]
    engine = ready(reweighting("exact", "fp16"))
    for level in engine.problems:
        level.make_scaler().update(2.0**22)
    before = engine.inner.scaler.state_dict()
    assert relative(engine.probe("outer").total[0], reference) < 3e-3 and engine.inner.scaler.state_dict() == before


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_in_fp16_is_the_loop_of_the_torch_documentation(accumulation):
    "Loss scaling with overflows, clipping, accumulation, momentum and a scheduler: the same bits"
    (x, y), _ = cancer(60)
    batches = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]

    class Fit(ImplicitProblem):
        def training_step(self, batch):
            return F.binary_cross_entropy_with_logits(self.module(batch[0]), batch[1])

    def parts():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        return net, sgd, lrs.StepLR(sgd, 4, 0.5)

    net, sgd, scheduler = parts()
    config = Config(
        precision="fp16", gradient_accumulation=accumulation, gradient_clipping=0.1, initial_dynamic_scale=2.0**26, scale_factor=4.0
    )
    level = Fit("fit", config, net, sgd, scheduler, fixed(*batches))
    Engine([level], EngineConfig(strategy="cpu")).run(12 * accumulation)

    hand, sgd, scheduler = parts()
    scaler, skipped = torch.amp.GradScaler("cpu", 2.0**26, growth_factor=4.0, backoff_factor=0.25), 0
    for step in range(12):
        for i in range(accumulation):
            a, b = batches[(step * accumulation + i) % 3]
            with torch.autocast("cpu", torch.float16):
                loss = F.binary_cross_entropy_with_logits(hand(a), b)
            scaler.scale(loss / accumulation).backward()
        scaler.unscale_(sgd)
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 0.1)
        scaler.step(sgd)
        scale = scaler.get_scale()
        scaler.update()
        sgd.zero_grad()
        if scaler.get_scale() >= scale:
            scheduler.step()
        else:
            skipped += 1
    assert skipped >= 2 and scaler.get_scale() == level.scaler.get_scale() == 2.0**26 / 4**skipped
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), hand.parameters()))
    assert level.scheduler.last_epoch == 12 - skipped == scheduler.last_epoch and level.count == 12 * accumulation


def test_an_overflow_halves_the_scale_and_leaves_the_level_as_it_is():
    calls = []

    class Watched(ImplicitProblem):
        def training_step(self):
            return (self.module(torch.full((4, 3), 100.0)) * 100).square().sum()

        def grad_callback(self):
            calls.append(("grad", self.module.weight.grad.isfinite().all().item()))

        def param_callback(self):
            calls.append(("param",))

    net = torch.nn.Linear(3, 1)
    level = Watched("one", Config(precision="fp16", initial_dynamic_scale=2.0**15), net, torch.optim.SGD(net.parameters(), lr=1e-12))
    level.scheduler, before = lrs.StepLR(level.optimizer, 1, 0.5), net.weight.clone()
    engine = Engine([level], EngineConfig(strategy="cpu"))
    engine.run(1)
    assert torch.equal(net.weight, before) and level.scaler.get_scale() == 2.0**14 and level.scheduler.last_epoch == 0 and calls == []
    assert (level.count, level.steps, net.weight.grad) == (1, 1, None)


def test_the_unroll_of_an_iterative_level_survives_an_overflow():
    engine = reweighting("unroll", "fp16", steps=12, initial_dynamic_scale=2.0**24)
    ready(engine)
    result = engine.probe("outer").passages["inner"].solve
    made = len(engine.inner.path)
    assert 0 < made < 12 and result.iterations == made and result.status == "fixed", "overflowed steps are no part of the unroll"


def test_the_scaler_is_saved_and_undisturbed():
    engine = reweighting("cg", "fp16")
    assert engine.inner._scaler is None and engine.probe("outer") and engine.inner._scaler is None, "looking makes no scaler"
    engine.run(40)
    state = engine.inner.state_dict()
    assert (
        state["scaler"]["_growth_tracker"] > 0
        and reweighting("cg").inner.scaler is None
        and "scaler" not in reweighting("cg").inner.state_dict()
    )
    other = reweighting("cg", "fp16", initial_dynamic_scale=8.0)
    other.inner.load_state_dict(state)
    assert other.inner.scaler.state_dict() == engine.inner.scaler.state_dict()
    before = engine.inner.scaler.state_dict()
    for method in METHODS:
        if make_method(method).serves == "implicit":
            engine.probe("outer", methods={"inner": make_method(method)})
    assert engine.inner.scaler.state_dict() == before


@pytest.mark.parametrize("method", ["cg", "unroll"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_going_back_in_half_precision_is_exact(precision, method):
    def program():
        options = {"initial_dynamic_scale": 2.0**24}  # overflows in the beginning
        return Debugger(
            reweighting(method, precision, steps=5, gradient_accumulation=2, scheduler=lambda o: lrs.StepLR(o, 3, 0.9), **options)
        )

    def everything(engine):
        scalers = [torch.tensor(list(map(float, p.scaler.state_dict().values()))) for p in engine.problems if p._scaler is not None]
        return bits(engine) + [torch.tensor(p.grad_scale) for p in engine.problems] + scalers

    debugger, trail = program(), []
    for _ in range(45):
        trail.append(everything(debugger.engine))
        debugger.step()
    for back in (1, 3, 20, 10):
        debugger.back(back)
        at = len(trail) - back
        assert same(everything(debugger.engine), trail[at])
        debugger.step(back)
    debugger.back(45)
    for state in trail:
        assert same(everything(debugger.engine), state)
        debugger.step()


def test_precision_is_read_when_it_is_used():
    engine, seen = reweighting("cg", gradient_accumulation=4), []
    engine.inner.module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    plain = reweighting("cg", gradient_accumulation=4)
    for precision in ("fp32", "bf16", "fp16", "fp32"):  # within one update
        engine.inner.config.precision = precision
        engine.run(1), plain.run(1)
    assert seen == [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    assert torch.allclose(engine.inner.module.weight, plain.inner.module.weight, atol=1e-3)
    engine.inner.config.precision = "fp16"
    engine.run(3), plain.run(3)
    engine.inner.config.precision = "fp32"  # three quarters of the gradient are there, enlarged
    engine.run(1), plain.run(1)
    assert torch.allclose(engine.inner.module.weight, plain.inner.module.weight, atol=2e-3)


def test_a_step_by_hand_between_accumulated_batches_may_change_the_scale():
    engine, plain = (reweighting("cg", p, gradient_accumulation=3, initial_dynamic_scale=2.0**18) for p in ("fp16", "fp32"))
    for e in (engine, plain):
        e.run(2)
        gathered = e.inner.module.weight.grad.clone()
        e.by_hand("inner")
        assert torch.equal(e.inner.module.weight.grad, gathered)
    while plain.inner.scaler is None and engine.inner.scaler.get_scale() > 2.0**10:
        engine.inner.scaler.update(2.0**10)
    engine.run(1), plain.run(1)
    assert torch.allclose(engine.inner.module.weight, plain.inner.module.weight, atol=2e-3)


def test_a_module_stored_in_half_precision_is_refused_for_fp16():
    net = torch.nn.Linear(3, 1).half()

    class Fit(ImplicitProblem):
        def training_step(self):
            return self.module(torch.ones(1, 3).half()).square().sum()

    level = Fit("fit", Config(precision="fp16"), net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Level 'fit': .* 'weight' is stored in float16: call .float.. on the module"):
        Engine([level], EngineConfig(strategy="cpu")).run(1)


def test_a_displacement_that_half_precision_rounds_away_is_reported():
    solve = ready(reweighting("darts", "bf16")).probe("outer").passages["inner"].solve
    assert solve.status == "rounding" and "set alpha to about 0." in solve.advice
    assert ready(reweighting("darts")).probe("outer").passages["inner"].solve.status == "fixed"


# 2 Rolling back


def ridge(method, roll_back, unroll, accumulation, noise=False):
    "Ridge regression with a learned penalty, on batches that differ"
    torch.manual_seed(0)
    dtype = torch.float64
    (x, y), (xv, yv) = cancer(120, dtype)
    w, rho = Vector(30).to(dtype), Vector(30, -2.0).to(dtype)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return (x @ self() - y[:, 0]).square().mean() + (self.outer().exp() * self().square()).sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return (x @ self.inner() - y[:, 0]).square().mean()

    inner = Inner("inner", Config(type=method, unroll_steps=unroll, gradient_accumulation=accumulation), w,
                  torch.optim.SGD(w.parameters(), lr=0.02, momentum=0.9), train_data_loader=fixed(*((x[i : i + 24], y[i : i + 24]) for i in range(0, 120, 24))))  # fmt: skip
    inner.scheduler = lrs.ExponentialLR(inner.optimizer, 0.97)
    outer = Outer(
        "outer", None, rho, torch.optim.Adam(rho.parameters(), lr=0.05), train_data_loader=fixed((xv[:60], yv[:60]), (xv[60:], yv[60:]))
    )
    return Engine([outer, inner], EngineConfig(strategy="cpu", train_iters=1000, roll_back=roll_back), BOTH)


def ridge_by_hand(engine, method, unroll, accumulation, rounds):
    "The same program in plain torch: virtual steps, upper step, real steps. Returns (w, rho)"
    batches, upper_batches = engine.inner.train_data_loader, engine.outer.train_data_loader
    w, rho = torch.zeros(30, dtype=torch.float64, requires_grad=True), torch.full((30,), -2.0, dtype=torch.float64, requires_grad=True)
    momentum, rate, updates = None, 0.02, 0
    adam = torch.optim.Adam([rho], lr=0.05)

    def lower(w, rho, batch):
        return (batch[0] @ w - batch[1][:, 0]).square().mean() + (rho.exp() * w.square()).sum()

    def unrolled(w, momentum, updates, chosen):
        for group in chosen:
            gradient = sum(torch.autograd.grad(lower(w, rho, b) / accumulation, w)[0] for b in group)
            momentum = gradient if momentum is None else 0.9 * momentum + gradient
            w = (w - rate * 0.97**updates * momentum).detach().requires_grad_()
            updates += 1
        return w, momentum, updates

    drawn = 0
    for r in range(rounds):
        chosen = [[batches[(drawn + u * accumulation + a) % 5] for a in range(accumulation)] for u in range(unroll)]
        drawn += unroll * accumulation
        virtual, _, _ = unrolled(w, momentum, updates, chosen)
        x, y = upper_batches[r % 2]
        (v,) = torch.autograd.grad((x @ virtual - y[:, 0]).square().mean(), virtual)
        last = chosen[-1][-1]
        if method == "darts":
            step = 0.01 / v.norm() * v
            plus, minus = (torch.autograd.grad(lower(virtual.detach() + s * step, rho, last), rho)[0] for s in (1, -1))
            gradient = -(plus - minus) / (2 * 0.01 / v.norm())
        else:
            H = torch.autograd.functional.hessian(lambda w, last=last: lower(w, rho, last), virtual)
            (slope,) = torch.autograd.grad(lower(virtual, rho, last), virtual, create_graph=True)
            gradient = -torch.autograd.grad(slope, rho, torch.linalg.solve(H, v))[0]
        rho.grad = gradient
        adam.step()
        w, momentum, updates = unrolled(w, momentum, updates, chosen)
    return w, rho


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("method", ["darts", "exact"])
def test_defect_7_rolling_back_is_virtual_step_upper_step_real_step(method, accumulation, unroll):
    engine = ridge(method, True, unroll, accumulation)
    rounds = 7
    engine.run(rounds * unroll * accumulation)
    w, rho = ridge_by_hand(engine, method, unroll, accumulation, rounds)
    assert torch.allclose(engine.inner(), w, rtol=1e-11, atol=1e-12) and torch.allclose(engine.outer(), rho, rtol=1e-11, atol=1e-12)
    plain = ridge(method, False, unroll, accumulation)
    plain.run(rounds * unroll * accumulation)
    for name in ("count", "steps", "drawn"):
        assert getattr(engine.inner, name) == getattr(plain.inner, name) and getattr(engine.outer, name) == getattr(plain.outer, name)
    assert engine.inner.scheduler.last_epoch == plain.inner.scheduler.last_epoch == rounds * unroll
    assert relative(plain.inner(), w) > 1e-6, "rolling back made no difference"


def test_rolling_back_repeats_the_dropout_masks_and_then_goes_on():
    engine = noisy_program("cg")
    engine.config.roll_back, masks, outputs = True, {}, []
    engine.inner.module[2].register_forward_hook(lambda module, args, out: outputs.append((out != 0)))
    states = []
    while engine.completed < 16:
        outputs.clear()
        action = engine.advance()
        if (action.kind, action.level) == ("descend", "inner"):
            masks[engine.inner.count, action.again is not None] = outputs[0]
        if action.kind == "roll_back":
            states.append(torch.get_rng_state())
        if action.again == 3:
            assert torch.equal(torch.get_rng_state(), states[-1]), "the generator goes on from where it stood"
    for count in range(1, 17):
        assert torch.equal(masks[count, False], masks[count, True])
    assert not torch.equal(masks[1, False], masks[2, False]) and len(states) == 4


def test_rolling_back_restores_batch_norm_and_the_optimizer():
    "With an upper level that does not move, a trial and its repetition are the same steps, so the run is the one without"

    def program(roll_back):
        engine = noisy_program("cg")
        engine.config.roll_back = roll_back
        for group in engine.outer.optimizer.param_groups:
            group["lr"] = 0.0
        engine.outer.module.value.data.fill_(-3.0)
        engine.outer.training_step = lambda batch: (
            engine.outer.module().sum() + 0 * engine.inner.module[4].weight.sum()
        )  # no pass of the net
        return engine

    rolled = program(True)
    rolled.run(20)
    end = bits(rolled)
    plain = program(False)
    plain.run(20)
    assert same(end, bits(plain)) and rolled.inner.module[1].num_batches_tracked == 20
    assert sum(group["lr"] for group in rolled.inner.optimizer.param_groups) == 0.01 / 4


class Scalar(Vector):
    def __init__(self, value):
        super().__init__(1)
        self.double().value.data.fill_(value)  # in double precision


def three_levels(roll_back=True, kind=ImplicitProblem):
    class Low(kind):
        def training_step(self, batch):
            return 0.5 * (self() - self.mid() * batch - 0.3 * self.top()).square().sum()

    class Mid(ImplicitProblem):
        def training_step(self, batch):
            return 0.5 * (self.low() - 1).square().sum() + 0.5 * (self() - batch * self.top()).square().sum()

    class Top(ImplicitProblem):
        def training_step(self, batch):
            return 0.5 * (self.mid() + self.low() - batch).square().sum()

    modules = [Scalar(v) for v in (0.5, 0.2, -0.4)]
    sgd = [torch.optim.SGD(m.parameters(), lr=r, momentum=0.5) for m, r in zip(modules, (0.1, 0.2, 0.3))]
    config = {} if kind is IterativeProblem else {"type": "exact"}
    top = Top("top", None, modules[0], sgd[0], train_data_loader=[2.0, 3.0])
    mid = Mid("mid", Config(type="exact", unroll_steps=2), modules[1], sgd[1], train_data_loader=[0.5, 1.5, 2.5])
    low = Low("low", Config(unroll_steps=3, **config), modules[2], sgd[2], train_data_loader=[1.0, 2.0, 0.5, -1.0])
    return Engine([top, mid, low], EngineConfig(strategy="cpu", train_iters=1000, roll_back=roll_back),
                  {"u2l": {"top": ["mid", "low"], "mid": ["low"]}, "l2u": {"low": ["mid", "top"], "mid": ["top"]}})  # fmt: skip


def three_levels_by_hand(rounds):
    "Rounds of three low steps. All derivatives are written out: dlow/dmid = batch, dlow/dtop = 0.3, dmid/dtop of the middle loss alone = its batch"
    t, m, w, moments = 0.5, 0.2, -0.4, {"t": 0.0, "m": 0.0, "w": 0.0}
    low_batches, mid_batches, top_batches = [1.0, 2.0, 0.5, -1.0], [0.5, 1.5, 2.5], [2.0, 3.0]

    def lower(w, v, chosen):
        for b in chosen:
            v = 0.5 * v + (w - m * b - 0.3 * t)
            w = w - 0.3 * v
        return w, v

    def middle(m, v, a, w, b):
        v = 0.5 * v + (m - a * t) + (w - 1) * b  # direct part, and through low: b H^-1 (w - 1)
        return m - 0.2 * v, v

    held = None  # the middle level's trial: (m, moment) at its beginning, and its batches
    tops = 0
    for r in range(rounds):
        chosen = [low_batches[(3 * r + i) % 4] for i in range(3)]
        trial, _ = lower(w, moments["w"], chosen)
        a, b = mid_batches[r % 3], chosen[-1]
        held = held or (m, moments["m"], [])
        held[2].append(a)
        m, moments["m"] = middle(m, moments["m"], a, trial, b)
        if r % 2:
            c = top_batches[tops % 2]
            tops += 1
            slope = m + trial - c
            # mid: H = 1, its derivative in top -a; it passes nothing to low, since its own loss holds low: -(d2C_mid / dlow dmid) = 0
            gradient = slope * a + slope * 0.3
            moments["t"] = 0.5 * moments["t"] + gradient
            t = t - 0.1 * moments["t"]
            m, moments["m"], again = held
            for a in again:
                m, moments["m"] = middle(m, moments["m"], a, trial, b)
            held = None
        w, moments["w"] = lower(w, moments["w"], chosen)
    return t, m, w


def test_rolling_back_three_levels():
    engine = three_levels()
    engine.run(3 * 11)
    t, m, w = three_levels_by_hand(11)
    found = [p().item() for p in (engine.top, engine.mid, engine.low)]
    assert found == pytest.approx([t, m, w], rel=1e-11, abs=1e-12)
    plain = three_levels(False)
    plain.run(3 * 11)
    assert [(p.count, p.steps, p.drawn) for p in engine.problems] == [(p.count, p.steps, p.drawn) for p in plain.problems]


def test_rolling_back_says_what_it_does():
    engine, said = three_levels(), []
    while engine.completed < 6:
        said.append(str(engine.advance()))
    assert [s for s in said if "draw" not in s][-16:] == [
        *["descend low"] * 3, "take the hypergradient of mid", "descend mid", "take the hypergradient of top", "descend top",
        "roll back mid", *["take the hypergradient of mid (again)", "descend mid (again)"] * 2, "roll back low", *["descend low (again)"] * 3,
    ]  # fmt: skip


def test_rolling_back_an_iterative_level_pulls_back_through_its_trial():
    "The hypergradient passes through the steps of the trial; the repetition ends where a copy of the same steps with new parameters does"
    engine = three_levels(kind=IterativeProblem)
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    assert engine.probe("mid").passages["low"].solve.status == "fixed" and len(engine.low.path) == 3
    while engine.next_action.again is None:
        engine.advance()
    m, t, w, v = engine.mid().item(), engine.top().item(), -0.4, 0.0
    while engine.next_action.again is not None:
        engine.advance()
    for b in (1.0, 2.0, 0.5):
        v = 0.5 * v + (w - m * b - 0.3 * t)
        w -= 0.3 * v
    assert engine.low().item() == pytest.approx(w, abs=1e-12) and len(engine.low.path) == 3
    assert engine.probe("mid").passages["low"].solve.status == "fixed", "the path is that of the repeated steps"


@pytest.mark.parametrize("method", ["cg", "unroll"])
def test_rolling_back_can_be_stepped_and_gone_back_through(method):
    def program():
        engine = noisy_program(method)
        engine.config.roll_back, engine.inner.config.gradient_accumulation = True, 2
        return engine

    ran = program()
    ran.run(24)
    debugger, trail = Debugger(program()), []
    while debugger.engine.completed < 24:
        trail.append(bits(debugger.engine))
        debugger.step()
    assert same(bits(debugger.engine), bits(ran)), "stepping is running"
    at = [i for i, a in enumerate(debugger.timeline.log) if a.again == 3][0]
    debugger.goto(at)
    assert debugger.engine.next_action.again == 3 and debugger.engine.inner.trial.after is not None
    while debugger.engine.completed < 24:
        debugger.step()
    assert same(bits(debugger.engine), bits(ran)), "from the middle of a repetition"
    debugger.back(len(trail) - 5)
    for state in trail[5:]:
        assert same(bits(debugger.engine), state)
        debugger.step()


def test_steps_by_hand_within_a_trial_are_repeated_too():
    engine = ridge("exact", True, 2, 1)
    engine.advance(), engine.advance()
    engine.by_hand("inner")
    assert [s.manual for s in engine.inner.trial.steps] == [False, True]
    while engine.inner.trial is not None:
        engine.advance()
    engine_2 = ridge("exact", False, 2, 1)
    engine_2.outer.module.value.data.copy_(engine.outer())
    engine_2.advance(), engine_2.advance()
    engine_2.by_hand("inner")
    engine_2.advance(), engine_2.advance()
    assert torch.equal(engine.inner(), engine_2.inner()) and engine.inner.steps == engine_2.inner.steps == 3


def test_rolling_back_in_fp16_puts_the_scaler_back():
    engine = reweighting("cg", "fp16", steps=4, initial_dynamic_scale=2.0**24)
    engine.config.roll_back = True
    scales = []
    while engine.completed < 8:
        action = engine.advance()
        if action.kind == "roll_back":
            scales.append(engine.inner.scaler.get_scale())
    assert scales[0] == 2.0**24 and scales[1] == 2.0**20
    plain = reweighting("cg", "fp16", steps=4, initial_dynamic_scale=2.0**24)
    plain.run(8)
    assert engine.inner.scaler.state_dict() == plain.inner.scaler.state_dict()


def test_two_lower_levels_are_rolled_back_when_the_upper_one_has_stepped():
    class Lower(ImplicitProblem):
        def training_step(self, batch):
            return 0.5 * (self() - batch * self.top()).square().sum()

    class Top(ImplicitProblem):
        def training_step(self):
            return (self.a() + self.b() - 5).square().sum()

    a, b, t = Scalar(0.0), Scalar(0.0), Scalar(1.0)
    sgd = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (a, b, t)]
    levels = [Lower("a", Config(type="exact", unroll_steps=2), a, sgd[0], train_data_loader=[1.0, 2.0, 3.0, 4.0]),
              Lower("b", Config(type="exact", unroll_steps=3), b, sgd[1], train_data_loader=[1.0]), Top("top", None, t, sgd[2])]  # fmt: skip
    engine = Engine(
        levels,
        EngineConfig(strategy="cpu", roll_back=True, train_iters=100),
        {"u2l": {"top": ["a", "b"]}, "l2u": {"a": ["top"], "b": ["top"]}},
    )
    engine.run(3)
    found = {}
    for name, batches in (("a", (1.0, 2.0, 3.0)), ("b", (1.0,) * 3)):
        w = 0.0
        for batch in batches:
            w -= 0.5 * (w - batch * t().item())
        found[name] = w
    assert a().item() == pytest.approx(found["a"]) and b().item() == pytest.approx(found["b"]) and t().item() != 1.0
    assert engine.a.trial is engine.b.trial is None and (engine.a.count, engine.b.count, engine.top.count) == (3, 3, 1)


def test_during_warm_up_nothing_is_rolled_back():
    engine = ridge("darts", True, 2, 1)
    engine.inner.config.warmup_steps = 4
    kinds = []
    while engine.completed < 6:
        kinds.append(engine.advance().kind)
    assert kinds.count("roll_back") == 1 and "roll_back" not in kinds[:12]


# 3 Schedulers, parameter groups, clipping, warm-up

SCHEDULERS = {
    "StepLR": lambda o: lrs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 7]),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.95),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.3, 5),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.3, 1.0, 6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 1.0, 40),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, threshold=0.2, factor=0.5),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 4), lrs.CosineAnnealingLR(o, 6)], [4]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 3), lrs.ExponentialLR(o, 0.9)]),
}


class Fit(ImplicitProblem):
    "Logistic regression, or whatever network is the module"

    def training_step(self, batch):
        return F.binary_cross_entropy_with_logits(self.module(batch[0]), batch[1])


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def single(config=None, net=None, optimizer=None, scheduler=None, cls=Fit, batches=3):
    "An engine of one level that fits the tumours"
    (x, y), _ = cancer(60)
    size = 60 // batches
    net = network() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer(net)
    loader = fixed(*((x[i : i + size], y[i : i + size]) for i in range(0, 60, size)))
    return Engine(
        [cls("fit", config, net, optimizer, scheduler and scheduler(optimizer), loader)], EngineConfig(strategy="cpu", train_iters=1000)
    )


def by_hand(engine, net, optimizer, scheduler=None, updates=20, accumulation=1, clip=0.0):
    "`updates` updates in plain torch; the learning rates used"
    batches, rates = engine.fit.train_data_loader, []
    for u in range(updates):
        rates.append([group["lr"] for group in optimizer.param_groups] + [optimizer.param_groups[0].get("momentum")])
        for i in range(accumulation):
            x, y = batches[(u * accumulation + i) % len(batches)]
            loss = F.binary_cross_entropy_with_logits(net(x), y)
            (loss / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    return rates


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_defect_11_every_scheduler(name):
    make = SCHEDULERS[name]
    engine, net = single(Config(gradient_accumulation=2), scheduler=make), network()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    expected = by_hand(engine, net, sgd, make(sgd), accumulation=2)
    rates = []
    for _ in range(20):
        group = engine.fit.optimizer.param_groups[0]
        rates.append([group["lr"], group["momentum"]])
        engine.run(2)
    assert rates == expected and len({r[0] for r in rates}) > 1, "the rate never changed"
    assert all(torch.equal(a, b) for a, b in zip(engine.fit.parameters(), net.parameters()))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_going_back_with_every_scheduler(name):
    debugger, trail = Debugger(single(scheduler=SCHEDULERS[name])), []
    for _ in range(12):
        trail.append((bits(debugger.engine), dict(debugger.engine.fit.optimizer.param_groups[0])))
        debugger.step()
    debugger.back(12)
    for state, group in trail:
        assert same(bits(debugger.engine), state) and group["momentum"] == debugger.engine.fit.optimizer.param_groups[0]["momentum"]
        debugger.step()


OPTIMIZERS = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01),
    "Adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.1),
    "groups": lambda net: torch.optim.AdamW(
        [{"params": net[0].parameters(), "lr": 0.05, "weight_decay": 0.2}, {"params": net[2].parameters()}], lr=0.01
    ),
    "left out": lambda net: torch.optim.Adam(net[2].parameters(), lr=0.05),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_defect_9_the_optimizer_is_used_as_it_is(name):
    "Its groups, its state, the parameters it does not hold, and those that are frozen"
    nets = network(), network()
    for net in nets:
        net[0].bias.requires_grad_(False)
    optimizer = OPTIMIZERS[name](nets[0])
    nets[0](torch.ones(1, 30)).sum().backward()  # a state from before
    optimizer.step(), optimizer.zero_grad()
    engine = single(net=nets[0], optimizer=lambda net: optimizer)
    assert engine.fit.optimizer is optimizer
    hand = OPTIMIZERS[name](nets[1])
    nets[1](torch.ones(1, 30)).sum().backward()
    hand.step(), hand.zero_grad()
    engine.run(20)
    by_hand(engine, nets[1], hand)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert torch.equal(nets[0][0].bias, network()[0].bias), "a frozen parameter moved"
    if name == "left out":
        assert torch.equal(nets[0][0].weight, network()[0].weight), "a parameter that was left out moved"


def test_clipping_and_accumulation_are_the_plain_loop():
    engine, net = single(Config(gradient_accumulation=3, gradient_clipping=0.05)), network()
    engine.run(30)
    by_hand(engine, net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), updates=10, accumulation=3, clip=0.05)
    assert all(torch.equal(a, b) for a, b in zip(engine.fit.parameters(), net.parameters()))


def test_the_hypergradient_is_accumulated_and_clipped_too():
    def program(**options):
        engine = reweighting("exact", steps=2)
        engine.outer.config = Config(**options)
        return engine

    plain = ready(program())
    expected = plain.probe("outer").total[0]
    limit = expected.norm().item() / 3
    clipped = ready(program(gradient_clipping=limit))
    clipped.advance(), clipped.advance()
    assert torch.allclose(clipped.outer(), -0.1 * expected / 3, rtol=1e-4)
    halves = program(gradient_accumulation=2)
    gradients = []
    while halves.outer.count < 2:
        if halves.next_action.kind == "hypergradient":
            gradients.append(halves.probe("outer").total[0])
        halves.advance()
    assert torch.allclose(halves.outer(), -0.1 * (gradients[0] + gradients[1]) / 2, rtol=1e-6)


def test_warm_up_keeps_the_upper_levels_waiting():
    engine = reweighting("cg", steps=4)
    engine.inner.config.warmup_steps = 10
    engine.run(11)
    assert engine.outer.count == 0
    engine.run(1)
    assert engine.outer.count == 1, "the first call is at the end of the first unroll past the warm-up"
    engine.run(8)
    assert engine.outer.count == 3


# 4 Callbacks, loaders and batches


class Told(ImplicitProblem):
    "Writes down every callback"

    def __init__(self, *args, **kwargs):
        self.told = []
        super().__init__(*args, **kwargs)

    def on_inner_loop_start(self):
        self.told.append("start")

    def training_step(self, batch):
        self.told.append("loss")
        return (self.module() - batch).square().sum()

    def grad_callback(self):
        assert all(p.grad is not None for p in self.trainable_parameters())
        self.told.append("grad")

    def clip_grad(self):
        self.told.append("clip")
        super().clip_grad()

    def custom_optimizer_step(self):
        self.told.append("step")
        super().custom_optimizer_step()

    def step_scheduler(self):
        self.told.append("scheduler")

    def param_callback(self):
        assert all(p.grad is None for p in self.trainable_parameters())
        self.told.append("param")

    def epoch_callback(self):
        self.told.append("epoch")


def test_callbacks_come_in_order_and_as_often_as_they_should():
    module = Vector(2)
    level = Told(
        "one",
        Config(unroll_steps=2, gradient_accumulation=2),
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        train_data_loader=[0.0, 1.0, 2.0],
    )
    Engine([level], EngineConfig(strategy="cpu")).run(8)
    update = ["grad", "clip", "step", "scheduler", "param"]
    assert level.told == [
        "start",
        "loss",
        "loss",
        *update,
        "loss",
        "epoch",
        "loss",
        *update,
        "start",
        "loss",
        "loss",
        *update,
        "epoch",
        "loss",
        "loss",
        *update,
    ]
    assert level.told.count("grad") == 4 and level.told.count("epoch") == 2


def test_a_gradient_callback_sees_the_full_gradient_and_may_change_it():
    class Signed(Fit):
        def grad_callback(self):
            for p in self.trainable_parameters():
                p.grad.sign_()

        def param_callback(self):
            for p in self.trainable_parameters():
                p.data.clamp_(-0.05, 0.05)

    engine, net = (
        single(Config(gradient_accumulation=3), cls=Signed, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.01)),
        network(),
    )
    engine.run(6)
    for _ in range(2):
        for x, y in engine.fit.train_data_loader:
            (F.binary_cross_entropy_with_logits(net(x), y) / 3).backward()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_((p - 0.01 * p.grad.sign()).clamp(-0.05, 0.05))
                p.grad = None
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(engine.fit.parameters(), net.parameters()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_defect_11_a_custom_step_needs_no_optimizer(precision):
    class Own(Fit):
        def custom_optimizer_step(self):
            with torch.no_grad():
                for p in self.trainable_parameters():
                    p -= 0.1 * p.grad

    engine, net = single(Config(precision=precision), cls=Own, optimizer=lambda net: None), network()
    engine.run(20)
    by_hand(engine, net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(torch.allclose(a, b, atol=1e-7 if precision == "fp32" else 5e-3) for a, b in zip(engine.fit.parameters(), net.parameters()))
    Debugger(engine).step(3)


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "tumours"


class Encoding(UserDict):
    "What tokenizers of Hugging Face return"

    def to(self, device):
        self.data = {k: v.to(device) for k, v in self.data.items()}
        return self

    def __getattr__(self, item):
        try:
            return self.data[item]
        except KeyError:
            raise AttributeError(item) from None


SHAPES = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), lambda b: tuple(b.values())),
    "defaultdict": (lambda x, y: defaultdict(list, x=x, y=y), lambda b: (b["x"], b["y"])),
    "user dict": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "encoding": (lambda x, y: Encoding(x=x, y=y), lambda b: (b.x, b.y)),
    "namedtuple": (lambda x, y: Pair(x, y), lambda b: (b.x, b.y)),
    "dataclass": (lambda x, y: Sample(x, y), lambda b: (b.x, b.y)),
    "tensor": (lambda x, y: torch.cat([x, y], 1), lambda b: (b[:, :-1].contiguous(), b[:, -1:])),  # another layout in memory would be added up in another order
    "nested": (lambda x, y: {"in": [Pair(x, None), "text", 3], "out": {"y": (y,)}}, lambda b: (b["in"][0].x, b["out"]["y"][0])),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_defect_11_batches_of_any_nesting(name):
    make, unpack = SHAPES[name]
    (x, y), _ = cancer(60)
    batch, got = make(x, y), []

    class Taking(ImplicitProblem):
        def training_step(self, batch):
            got.append(batch)
            x, y = unpack(batch)
            return F.binary_cross_entropy_with_logits(self.module(x), y)

    net, plain = network(), single(batches=1)
    engine = Engine(
        [Taking("fit", None, net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), train_data_loader=[batch])],
        EngineConfig(strategy="cpu"),
    )
    engine.run(5), plain.run(5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.fit.parameters()))
    assert all(b is batch for b in got), "moved or copied, though it was there already"
    if name != "encoding":  # that one moves itself
        moved = to_device(batch, torch.device("meta"))
        assert type(moved) is type(batch) and unpack(moved)[0].is_meta and not unpack(batch)[0].is_meta


def test_several_loaders_give_one_batch_each():
    (x, y), (xv, yv) = cancer(60)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 20)

    def endless():
        while True:
            yield xv, yv

    drawn = []

    class Two(ImplicitProblem):
        def training_step(self, batch):
            (x, y), (xv, yv) = batch
            drawn.append((x[0, 0].item(), len(xv)))
            return F.binary_cross_entropy_with_logits(self.module(torch.cat([x, xv])), torch.cat([y, yv]))

        def epoch_callback(self):
            drawn.append("epoch")

    net = network()
    Engine(
        [Two("two", None, net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=[data, endless()])],
        EngineConfig(strategy="cpu"),
    ).run(5)
    assert drawn == [(x[i, 0].item(), 60) if i is not None else "epoch" for i in (0, 20, 40, None, 0, 20)]


def test_defect_11_a_generator_that_ends_says_so():
    net = network()
    (x, y), _ = cancer(60)
    level = Fit("fit", None, net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=(pair for pair in [(x, y)] * 3))
    engine = Engine([level], EngineConfig(strategy="cpu"))
    with pytest.raises(RuntimeError, match="The train_data_loader of 'fit' gave no batch after 3 of them and cannot be started again"):
        engine.run(4)


def test_defect_11_config_and_dependencies_may_be_left_out():
    net = network()
    (x, y), _ = cancer(60)
    level = Fit("fit", None, net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=[(x, y)])
    engine = Engine(problems=[level], config=None, dependencies=None)
    engine.run(2)
    assert level.steps == 2 and level.config.unroll_steps == 1
    assert Engine([level], EngineConfig(train_iters=1), {}).graph.u2l == ()


# 5 What Betty's hypergradients crash on


def second_program(method, inner_module=None, make_optimizer=None, loss=None, outer_loss=None, dtype=torch.float64):
    "A lower network on the tumours, a weight decay above it"
    torch.manual_seed(0)
    (x, y), (xv, yv) = cancer(40, dtype)
    net = (inner_module or torch.nn.Linear(30, 1)).to(dtype)
    decay = Vector(2, -2.0).to(dtype)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            plain = F.binary_cross_entropy_with_logits(self.module(batch[0]), batch[1])
            penalty = 0.5 * self.outer().exp().sum() * sum(p.square().sum() for p in self.module.parameters())
            return loss(self, plain, penalty) if loss else {"loss": plain + penalty, "plain": plain, "text": "fine"}

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            value = F.binary_cross_entropy_with_logits(self.inner(batch[0]), batch[1])
            return outer_loss(self, value) if outer_loss else value

    optimizer = (make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(net.parameters())
    inner = Inner("inner", Config(type=method, unroll_steps=5), net, optimizer, train_data_loader=[(x, y)])
    outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1), train_data_loader=[(xv, yv)])
    return Engine([outer, inner], EngineConfig(strategy="cpu", train_iters=100), BOTH)


IMPLICIT = [name for name in METHODS if make_method(name).serves == "implicit"]


@pytest.mark.parametrize("name", IMPLICIT)
def test_defect_10_adamw_and_a_loss_dictionary_below(name):
    engine = second_program(name, make_optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    engine.run(10)
    assert engine.outer.count == 2 and engine.outer().isfinite().all() and (engine.outer() != -2).all()
    assert set(engine.inner.metrics) == {"loss", "plain", "text"} and not engine.inner.metrics["plain"].requires_grad


@pytest.mark.parametrize("name", IMPLICIT)
def test_defect_10_frozen_and_unused_parameters_and_a_linear_one(name):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = torch.nn.Linear(30, 30), torch.nn.Linear(30, 1), torch.nn.Linear(3, 1)
            self.linear = torch.nn.Parameter(torch.zeros(1))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(self.frozen(x))

    def loss(level, plain, penalty):
        used = sum(p.square().sum() for p in level.module.used.parameters())
        return plain + 0.5 * level.outer().exp().sum() * used + 1e-3 * level.module.linear.sum()

    engine = second_program(name, Odd(), loss=loss)
    kept = [p.clone() for p in (*engine.inner.module.frozen.parameters(), *engine.inner.module.unused.parameters())]
    if name == "exact":  # its Hessian has rows of zeros: least squares, or a sentence; the rest must go on
        engine.inner.config.type = "cg"
    engine.run(10)
    assert engine.outer.count == 2 and engine.outer().isfinite().all() and (engine.outer() != -2).all()
    assert all(
        torch.equal(a, b) for a, b in zip(kept, (*engine.inner.module.frozen.parameters(), *engine.inner.module.unused.parameters()))
    )


def test_defect_10_an_upper_loss_that_uses_its_own_parameters():
    engine = second_program("exact", outer_loss=lambda level, value: value + level.module().square().sum())
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    result = engine.probe("outer")
    assert torch.allclose(result.direct[0], 2 * engine.outer().detach()) and result.indirect[0].abs().max() > 0
    engine.run(10)


def transformer(dropout=0.0, width=6):
    class Attending(torch.nn.Module):
        "The features of a tumour as a sentence of words"

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.TransformerEncoderLayer(width, 2, 4, dropout, activation="gelu", batch_first=True)
            self.out = torch.nn.Linear(width, 1)

        def forward(self, x):
            return self.out(self.layer(x.reshape(len(x), -1, width)).mean(1))

    return Attending()


def kernels(graph):
    "Names of the attention kernels in the graph of a tensor"
    seen, stack, found = set(), [graph.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(node.name())
        stack += [n for n, _ in node.next_functions]
    return {name for name in found if "Attention" in name}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["exact", "cg", "neumann", "normal_cg", "nystrom", "identity"])
def test_defect_10_second_derivatives_through_attention(name, training):
    engine = second_program(make_method(name), transformer())
    engine.inner.module.train(training)
    taken, original = [], engine.inner.training_loss
    engine.inner.training_loss = lambda: taken.append(original()) or taken[-1]
    engine.run(5)
    assert taken and all("Flash" in name for loss in taken for name in kernels(loss)) and kernels(taken[0]), (
        "training keeps the fast kernel"
    )
    assert "Flash" in str(kernels(engine.outer.loss())) and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("name", ["darts", "sama", "penalty", "evolution"])
def test_methods_without_second_derivatives_keep_the_fast_kernel(name):
    engine, seen = second_program(name, transformer()), []
    original = engine.inner.training_step

    def watched(batch):
        result = original(batch)
        seen.append(kernels(result["loss"]))
        return result

    engine.inner.training_step = watched
    engine.run(5)
    assert len(seen) > 5 and all("Flash" in str(names) for names in seen)


def test_the_hypergradient_through_attention_is_right():
    "Against central differences of the mixed derivative, and a linear solve with a Hessian of central differences, in float64"
    engine = second_program("exact", transformer(width=2))
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    found = engine.probe("outer").total[0]
    theta, x = engine.inner.trainable_parameters(), engine.outer.module.value
    engine.outer.draw()

    def gradient():
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(engine.inner.loss(), theta)])

    def moved(i, step):
        "The gradient with the i-th number of theta moved"
        for p in theta:
            if i < p.numel():
                p.data.view(-1)[i] += step
                g = gradient()
                p.data.view(-1)[i] -= step
                return g
            i -= p.numel()

    n, h = sum(p.numel() for p in theta), 1e-5
    H = torch.stack([(moved(i, h) - moved(i, -h)) / (2 * h) for i in range(n)])
    v = torch.cat([g.reshape(-1) for g in torch.autograd.grad(engine.outer.loss(), theta)])
    w = torch.linalg.solve((H + H.T) / 2, v)
    expected = []
    for i in range(2):
        old = x.data.clone()
        x.data[i] = old[i] + h
        plus = gradient()
        x.data[i] = old[i] - h
        minus = gradient()
        x.data.copy_(old)
        expected.append(-((plus - minus) / (2 * h)) @ w)
    assert relative(found, torch.stack(expected)) < 1e-6


def test_the_unroll_goes_through_attention_too():
    torch.manual_seed(0)
    (x, y), (xv, yv) = cancer(40, torch.float64)

    class Inner(IterativeProblem):
        def training_step(self):
            return F.binary_cross_entropy_with_logits(self.module(x), y) + self.outer().exp().sum() * self.module.out.weight.square().sum()

    class Outer(ImplicitProblem):
        def training_step(self):
            return F.binary_cross_entropy_with_logits(self.inner(xv), yv)

    def engine(value=-2.0):
        torch.manual_seed(0)
        net = transformer().double()
        decay = Scalar(value)
        inner = Inner("inner", Config(unroll_steps=4), net, torch.optim.SGD(net.parameters(), lr=0.1))
        outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1))
        made = Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH)
        return ready(made)

    difference = (engine(-2 + 1e-5).outer.loss() - engine(-2 - 1e-5).outer.loss()).item() / 2e-5
    for method in ("unroll", "forward_mode"):
        one = engine()
        assert one.probe("outer", methods={"inner": make_method(method)}).total[0].item() == pytest.approx(difference, rel=1e-6)
