"""Iterative differentiation, for what the notebooks do not show: every optimizer in a real program, time travel, mixtures of levels, faults."""

import copy
import gc
import itertools
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

from betty_nb import Config, Debugger, Engine, EngineConfig, HigherIterativeProblem, ImplicitProblem, IterativeProblem, optim
from betty_nb.debugger.timeline import held
from betty_nb.hypergradient import ForwardMode, Unroll
from betty_nb.optim import differentiable_step
from betty_nb.problems.live import Row
from betty_nb.undisturbed import undisturbed
from tests.programs import BOTH, bits, same

DOUBLE = torch.float64
X, Y = (t.to(DOUBLE) for t in torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(0)))
Y = Y[:, :1]


class Vector(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.as_tensor(value, dtype=DOUBLE).clone())

    def forward(self):
        return self.value


class Inner(IterativeProblem):
    def training_step(self, batch):
        x, y = batch
        decay = sum((self.outer()[i].exp() * p.square()).sum() for i, p in enumerate(self.trainable_parameters()))
        return (self.module(x) - y).square().mean() + decay


class Outer(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner(X[14:]) - Y[14:]).square().mean()


def network(noise=False):
    between = [torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.3)] if noise else []
    return torch.nn.Sequential(torch.nn.Linear(4, 5), *between, torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


START = torch.tensor([-2.0, -1.5, -3.0, -2.2, -2.0, -2.5], dtype=DOUBLE)


def program(
    h=START, make=torch.optim.SGD, cls=Inner, noise=False, scheduler=None, config=None, net=None, outer=Outer, loader=None, **options
):
    torch.manual_seed(1)
    net, top = net or network(noise), Vector(h)
    optimizer = make(net.parameters(), **{"lr": 0.1, **options}) if isinstance(make, type) else make(net, top)
    inner = cls(
        "inner",
        config or Config(unroll_steps=10),
        net,
        optimizer,
        scheduler and scheduler(optimizer),
        loader or [(X[:7], Y[:7]), (X[7:14], Y[7:14])],
    )
    upper = outer("outer", None, top, torch.optim.SGD(top.parameters(), lr=0.1), train_data_loader=[0])
    return Engine([upper, inner], EngineConfig(train_iters=1000, strategy="cpu"), BOTH)


def at_hypergradient(engine, level="outer"):
    while (engine.next_action.kind, engine.next_action.level) != ("hypergradient", level):
        engine.advance()
    return engine


def central(h=START, width=1e-5, **options):
    "Central differences of the loss of the outer level over whole programs"
    h = torch.as_tensor(h, dtype=DOUBLE)

    def loss(at):
        return at_hypergradient(program(at, **options)).outer.loss().item()

    return torch.tensor([(loss(h + width * e) - loss(h - width * e)) / (2 * width) for e in torch.eye(len(h), dtype=DOUBLE)], dtype=DOUBLE)


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def probed(engine, method=None):
    result = engine.probe("outer", methods=method and {"inner": method})
    return result.total[0], result.passages["inner"].solve


def made_and_repeated(engine):
    "The hypergradient from the graph with which the steps were made where they were, after it was compared with that of repeated steps"
    made, solve = probed(engine)
    repeated, solve2 = probed(engine, Unroll(graph_mb=0))
    assert solve.status == solve2.status == "fixed" and solve.iterations == solve2.iterations
    assert error(repeated, made) < 1e-10
    return made, solve


OPTIMIZERS = {
    "SGD": dict(make=torch.optim.SGD, lr=0.1),
    "momentum": dict(make=torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "Nesterov": dict(make=torch.optim.SGD, momentum=0.9, nesterov=True),
    "dampening": dict(make=torch.optim.SGD, momentum=0.9, dampening=0.4, weight_decay=0.01),
    "Adam": dict(make=torch.optim.Adam, lr=0.05, weight_decay=0.01),
    "amsgrad": dict(make=torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW": dict(make=torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "RMSprop": dict(make=torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": dict(make=torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    "Adadelta": dict(make=torch.optim.Adadelta, lr=1.0),
    "Adamax": dict(make=torch.optim.Adamax, lr=0.05),
    "NAdam": dict(make=torch.optim.NAdam, lr=0.05),
    "RAdam": dict(make=torch.optim.RAdam, lr=0.05),
    "ASGD": dict(make=torch.optim.ASGD, lr=0.1),
}


MADE_WITH_GRAPH = ("SGD", "momentum", "Nesterov", "dampening", "Adam", "AdamW")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_against_central_differences_of_the_whole_program(name):
    engine = at_hypergradient(program(**OPTIMIZERS[name]))
    reverse, solve = made_and_repeated(engine)
    assert (engine.inner.path.stretches[-1].live is not None) == (name in MADE_WITH_GRAPH), "SGD, Adam and AdamW, whose formulas are known"
    assert solve.iterations == 10
    assert error(reverse, central(**OPTIMIZERS[name])) < 1e-6
    assert error(probed(engine, ForwardMode())[0], reverse) < 1e-10


@pytest.mark.parametrize("name", ["SGD", "momentum", "Nesterov", "dampening"])
def test_sgd_moves_lists_of_tensors_as_it_moves_each(name, monkeypatch):
    def reverse():
        engine = at_hypergradient(program(**OPTIMIZERS[name]))
        return made_and_repeated(engine)[0], bits(engine)

    moved, together = [], optim._sgd_together
    monkeypatch.setitem(optim._TOGETHER, optim._sgd, lambda ps, *rest: moved.append(len(ps)) or together(ps, *rest))
    (found, as_lists), lists = reverse(), set(moved)
    monkeypatch.setitem(optim._FROM, optim._sgd, 100)
    moved.clear()
    (one_by_one, single), none = reverse(), moved
    assert lists == {4} and not none
    assert torch.equal(found, one_by_one) and same(as_lists, single)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)  # moves the momentum too


ACCUMULATE = Config(unroll_steps=6, gradient_accumulation=2, gradient_clipping=0.3)


@pytest.mark.parametrize(
    "options",
    [
        dict(make=torch.optim.Adam, scheduler=one_cycle),
        dict(momentum=0.9, scheduler=one_cycle, noise=True),
        dict(momentum=0.9, config=ACCUMULATE),
        dict(
            make=lambda net, top: torch.optim.Adam(
                [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.01}]
            )
        ),
        dict(config=Config(unroll_steps=10, type=Unroll(checkpoint=3)), make=torch.optim.Adam, noise=True),
        dict(config=Config(unroll_steps=10, gradient_accumulation=2), make=torch.optim.Adam, noise=True),
    ],
    ids=["scheduler", "scheduler, dropout and BatchNorm", "accumulation and clipping", "groups", "checkpoint", "accumulation and dropout"],
)
def test_through_schedulers_groups_noise_and_accumulation(options):
    engine = at_hypergradient(program(**options))
    reverse, solve = made_and_repeated(engine)
    assert error(probed(engine, ForwardMode())[0], reverse) < 1e-10
    assert error(reverse, central(**options)) < 1e-6


@pytest.mark.parametrize("loss", [F.mse_loss, torch.nn.MSELoss(), lambda a, b: F.mse_loss(a, b, reduction="sum") / 7])
def test_forward_mode_goes_through_the_mean_squared_error(loss):
    "torch's derivative of its gradient writes to zeros that nobody may write to"

    class Fit(Inner):
        def training_step(self, batch):
            x, y = batch
            return loss(self.module(x), y) + self.outer().exp().sum() * sum(p.square().sum() for p in self.module.parameters())

    engine = at_hypergradient(program(cls=Fit))
    assert error(probed(engine, ForwardMode())[0], probed(engine)[0]) < 1e-10


def test_defect_1_iterative_differentiation_runs():
    "Betty's does not run at all on current torch"
    assert HigherIterativeProblem is IterativeProblem
    engine = program(make=torch.optim.Adam)
    before = engine.outer().clone()
    engine.run(100)
    assert engine.outer.steps == 10 and not torch.equal(engine.outer(), before)


def test_no_nan_from_the_square_root_at_zero():
    class Dead(Inner):
        def training_step(self, batch):
            x, y = batch
            return (self.module[1](torch.relu(self.module[0](x) - 50)) - y).square().mean() + self.outer()[0].exp() * self.module[
                1
            ].bias.square().sum()

    for make in (
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    ):
        net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1)).double()
        engine = at_hypergradient(program(cls=Dead, make=make, net=net, outer=Plain))
        for method in (None, ForwardMode()):
            gradient, solve = probed(engine, method)
            assert solve.status == "fixed" and gradient.isfinite().all() and gradient.norm() > 0, make


class Plain(ImplicitProblem):
    def training_step(self, batch):
        return sum((p - 1).square().sum() for p in self.inner.trainable_parameters())


def test_truncated():
    engine = at_hypergradient(program())
    full, _ = probed(engine)
    errors = [error(probed(engine, Unroll(truncate=k, checkpoint=4))[0], full) for k in range(1, 11)]
    assert errors[-1] < 1e-12 and errors[0] > errors[4] > errors[8] > 1e-6 and probed(engine, Unroll(truncate=3))[1].iterations == 3
    kept = at_hypergradient(program(config=Config(unroll_steps=10, type=Unroll(truncate=3, checkpoint=2))))
    assert 3 <= len(kept.inner.path) <= 5, "steps before the last three, up to a stretch, are not kept"
    assert error(probed(kept)[0], probed(engine, Unroll(truncate=3))[0]) < 1e-12
    assert probed(kept, Unroll())[1].status == "incomplete"


class Rate(Inner):
    def training_step(self, batch):
        x, y = batch
        return (self.module(x) - y).square().mean()

    def optimizer_options(self):
        return {"lr": self.outer()[0].exp()}


RATES = {k: dict(v, lr=0.5) for k, v in OPTIMIZERS.items() if k not in ("ASGD",)}


@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate_as_an_upper_level(name):
    options = dict(RATES[name], cls=Rate, h=[-3.0])
    engine = at_hypergradient(program(**options))
    reverse, solve = probed(engine)
    assert solve.status == "fixed" and error(reverse, central(**options)) < 1e-6
    assert error(probed(engine, ForwardMode())[0], reverse) < 1e-10


class Several(Rate):
    def optimizer_options(self):
        first, second, decay = self.outer().sigmoid()
        return {"betas": (first, second), "weight_decay": decay}


def test_other_learned_options():
    options = dict(cls=Several, h=[2.0, 3.0, -3.0], make=torch.optim.Adam, lr=0.05)
    assert error(probed(at_hypergradient(program(**options)))[0], central(**options)) < 1e-6

    class Momentum(Rate):
        def optimizer_options(self):
            return {"momentum": self.outer()[0].sigmoid(), "weight_decay": self.outer()[1].exp()}

    options = dict(cls=Momentum, h=[1.0, -3.0], nesterov=True, momentum=0.5)
    assert error(probed(at_hypergradient(program(**options)))[0], central(**options)) < 1e-6


def test_a_rate_that_is_itself_the_upper_parameter():
    class Bare(Rate):
        def optimizer_options(self):
            return {}

    for make in (torch.optim.SGD, torch.optim.Adam):
        options = dict(cls=Bare, h=0.05, make=lambda net, top, make=make: make(net.parameters(), lr=top.value))
        engine = at_hypergradient(program(**options))
        up, down = (at_hypergradient(program(**{**options, "h": 0.05 + d})).outer.loss().item() for d in (1e-5, -1e-5))
        assert abs(probed(engine)[0].item() - (up - down) / 2e-5) < 1e-6
    debugger = Debugger(engine)
    debugger.step(3)
    debugger.back(2)
    assert engine.inner.optimizer.param_groups[0]["lr"] is engine.outer.module.value, "going back keeps the tie"


# MAML


class Adapt(IterativeProblem):
    "Begins each unroll at the parameters of the upper level"

    def training_step(self, batch):
        x, y = batch
        return (self.module(x) - y).square().mean()

    def initial_parameters(self):
        return self.outer.module.parameters()


class Copied(Adapt):
    "The same as Betty programs write it"

    def initial_parameters(self):
        return None

    def on_inner_loop_start(self):
        self.module.load_state_dict(self.outer.module.state_dict())


def maml(cls, move=0.0, entry=0, config=None):
    torch.manual_seed(3)
    x = torch.rand(10, 1, dtype=DOUBLE) * 6 - 3
    task, query = (x, torch.sin(x + 0.5)), (x + 0.1, torch.sin(x + 0.6))
    meta = torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    net = copy.deepcopy(meta)
    with torch.no_grad():
        meta[0].weight.view(-1)[entry] += move

    class Meta(ImplicitProblem):
        def training_step(self, batch):
            return (self.inner(query[0]) - query[1]).square().mean()

    inner = cls("inner", config or Config(unroll_steps=5), net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=[task])
    outer = Meta("outer", None, meta, torch.optim.Adam(meta.parameters(), lr=0.01), train_data_loader=[0])
    return Engine([outer, inner], EngineConfig(train_iters=1000, strategy="cpu"), BOTH)


@pytest.mark.parametrize("cls", [Adapt, Copied])
def test_maml_against_central_differences(cls):
    gradient = at_hypergradient(maml(cls)).probe("outer").total[0].view(-1)
    central = []
    for entry in range(6):
        up, down = (at_hypergradient(maml(cls, move, entry)).outer.loss().item() for move in (1e-5, -1e-5))
        central.append((up - down) / 2e-5)
    assert error(gradient, torch.tensor(central, dtype=DOUBLE)) < 1e-6
    engine = at_hypergradient(maml(cls))
    forward = engine.probe("outer", methods={"inner": ForwardMode()}).total
    assert all(error(a, b) < 1e-10 for a, b in zip(forward, engine.probe("outer").total))


@pytest.mark.parametrize("cls", [Adapt, Copied])
def test_first_order_maml_is_the_plain_gradient(cls):
    engine = at_hypergradient(maml(cls, config=Config(unroll_steps=5, type=Unroll(first_order=True))))
    plain = torch.autograd.grad(engine.outer.loss(), engine.inner.trainable_parameters())
    assert all(error(a, b) < 1e-12 for a, b in zip(engine.probe("outer").total, plain))


def test_maml_learns():
    engine = maml(Adapt)
    at_hypergradient(engine)
    before = engine.outer.loss().item()
    engine.run(1000)
    assert at_hypergradient(engine).outer.loss().item() < 0.5 * before


# Looking and going back


def noisy(config=None):
    data = torch.utils.data.TensorDataset(X[:14], Y[:14])
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    return program(make=torch.optim.Adam, noise=True, config=config or Config(unroll_steps=7), loader=loader, lr=0.01)


def test_looking_leaves_everything_as_it_is():
    plain, looked = noisy(), noisy()
    plain.run(16)
    torch.manual_seed(1)
    looked = noisy()
    while looked.completed < 16:
        before = bits(looked), torch.get_rng_state(), looked.inner.optimizer, looked.inner.batch, (looked.inner.count, looked.inner.steps)
        for method in (Unroll(), ForwardMode(), Unroll(truncate=2)) if looked.global_step % 5 == 0 else (Unroll(checkpoint=2),):
            looked.probe("outer", methods={"inner": method})
        after = bits(looked), torch.get_rng_state(), looked.inner.optimizer, looked.inner.batch, (looked.inner.count, looked.inner.steps)
        assert same(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2:] == after[2:]
        looked.advance()
    assert same(bits(plain), bits(looked))


def interrupting(calls):
    "A function that is interrupted when it is called for the last of `calls` times"
    left = iter(range(calls - 1, -1, -1))

    def interrupt(*args):
        if next(left) == 0:
            raise KeyboardInterrupt

    return interrupt


def test_forward_mode_is_looked_at_without_its_memory():
    engine = at_hypergradient(program(weight_decay=0.1, config=Config(type="forward_mode", unroll_steps=3)))
    before, debugger = bits(engine), Debugger(engine)
    record = debugger.hypergradient("outer")  # torch crashes where dual numbers meet what counts the memory
    assert record.mb is None and record.total > 0
    rows = {row.method.split("(")[0]: row.mb for row in debugger.compare("outer", ["forward_mode", "unroll"]).rows}
    assert rows["forward_mode"] is None and rows["unroll"] > 0
    assert same(bits(engine), before)


def test_an_interrupt_inside_a_pull_back_leaves_everything_as_it_is():
    engine = at_hypergradient(noisy())
    parameters = engine.inner.trainable_parameters()
    before, net = bits(engine), engine.inner.module
    for calls in (1, 4, 8):
        handle = net.register_forward_hook(interrupting(calls))
        with pytest.raises(KeyboardInterrupt):
            engine.probe("outer", methods={"inner": Unroll(graph_mb=0)})
        handle.remove()
        assert same(before, bits(engine)) and all(a is b for a, b in zip(parameters, net.parameters()))
        assert all(isinstance(p, torch.nn.Parameter) for p in net.parameters())


def test_an_interrupt_before_anything_was_changed_is_that_interrupt(monkeypatch):
    engine, original = at_hypergradient(noisy()), undisturbed._keep
    before = bits(engine)

    def interrupting_the(number):
        calls = itertools.count(1)

        def keep(context):
            if next(calls) == number:
                raise KeyboardInterrupt
            original(context)

        return keep

    for number in (1, 2):  # the context of the look, and in it that of the repeated steps
        monkeypatch.setattr(undisturbed, "_keep", interrupting_the(number))
        with pytest.raises(KeyboardInterrupt):
            engine.probe("outer", methods={"inner": Unroll(graph_mb=0)})
        assert same(before, bits(engine))
    monkeypatch.undo()
    assert probed(engine, Unroll(graph_mb=0))[1].status == "fixed"


GRAPHS = pytest.mark.parametrize(
    "config",
    [
        dict(type=Unroll()),
        dict(type=Unroll(graph_mb=0)),
        dict(type=Unroll(first_order=True)),
        dict(type=Unroll(truncate=4)),
        dict(gradient_accumulation=2),
    ],
    ids=["made with their graph", "repeated", "first order", "truncated", "accumulation"],
)


@GRAPHS
def test_going_back_and_forth_gives_the_same_bits(config):
    straight = noisy(Config(unroll_steps=7, **config))
    straight.run(40)
    debugger = Debugger(noisy(Config(unroll_steps=7, **config)))
    engine = debugger.engine
    debugger.timeline.time_share = 1e-9  # hardly any snapshots, so that most of the way is replayed
    while engine.completed < 24:
        engine.advance()
    middle, at, hypergradient = bits(engine), debugger.timeline.index, engine.probe("outer").total
    engine.run(16)
    assert same(bits(engine), bits(straight))
    debugger.goto(at)
    assert same(bits(engine), middle)
    assert all(torch.equal(a, b) for a, b in zip(engine.probe("outer").total, hypergradient))
    engine.run(16)
    assert same(bits(engine), bits(straight))


@GRAPHS
def test_stepping_back_in_the_middle_of_an_unroll(config):
    debugger = Debugger(noisy(Config(unroll_steps=7, **config)))
    debugger.step(18)  # a snapshot before each
    states = []
    for _ in range(12):
        states.append((bits(debugger.engine), debugger.engine.probe("outer").total[0], debugger.timeline.index))
        debugger.back(1)
    for state, hypergradient, index in reversed(states):
        while debugger.timeline.index < index:
            debugger.step(1)
        assert same(state, bits(debugger.engine)) and torch.equal(hypergradient, debugger.engine.probe("outer").total[0])
    pieces = held(debugger.timeline.snapshots[-1].levels["inner"].memory.pieces)
    assert pieces and pieces.keys() <= debugger.timeline.holdings._times.keys(), "what the path holds counts towards the budget"


def test_steps_by_hand_belong_to_the_path():
    engine = program(make=torch.optim.Adam)
    for _ in range(9):
        engine.advance()
    engine.by_hand("inner")
    at_hypergradient(engine)
    result, solve = probed(engine)
    assert (solve.iterations, solve.status) == (11, "fixed")
    assert error(result, probed(engine, ForwardMode())[0]) < 1e-10


# Cost


class Live:
    "Counts the bytes of the storages that graphs hold at once"

    def __init__(self):
        self.users, self.now, self.most = {}, 0, 0

    def pack(self, tensor):
        class Held:
            pass

        held, storage = Held(), tensor.untyped_storage()
        held.tensor, key, size = tensor, storage.data_ptr(), storage.nbytes()
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.now += size
            self.most = max(self.most, self.now)
        weakref.finalize(held, self.free, key, size)
        return held

    def free(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size
            del self.users[key]


def weights_program(steps, width=64):
    "400 steps of a network on 64 weighted examples; the hypergradient of the weights, once with a graph over all steps, once through a path"
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, 16)
    net = torch.nn.Sequential(
        torch.nn.Linear(16, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 16)
    )
    begin = [p.detach().clone() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def weighted(out, w):
        return ((out - y).square().mean(1) * w.sigmoid()).mean()

    def plain():
        optimizer, w, state = (
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            torch.zeros(64, requires_grad=True),
            [{} for _ in begin],
        )
        theta = [p.clone().requires_grad_() for p in begin]
        for _ in range(steps):
            loss = weighted(torch.func.functional_call(net, dict(zip(names, theta)), (x,)), w)
            theta, state = differentiable_step(optimizer, theta, torch.autograd.grad(loss, theta, create_graph=True), state)
        return torch.autograd.grad(sum(p.square().sum() for p in theta), w)[0], 0

    class Lower(IterativeProblem):
        def training_step(self):
            return weighted(self.module(x), self.outer())

    class Upper(ImplicitProblem):
        def training_step(self):
            return sum(p.square().sum() for p in self.inner.trainable_parameters())

    def checkpointed():
        with torch.no_grad():
            for p, value in zip(net.parameters(), begin):
                p.copy_(value)
        top = Vector(torch.zeros(64)).float()
        inner = Lower("inner", Config(unroll_steps=steps, type=Unroll(graph_mb=0)), net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        outer = Upper("outer", None, top, torch.optim.SGD(top.parameters(), lr=0.1))
        engine = at_hypergradient(Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH))
        engine.advance()
        return top.value.grad, sum(start.nbytes for start in inner.path.kept().pieces)

    return plain, checkpointed


def test_400_steps_in_a_quarter_of_the_memory():
    results, bytes_held = [], []
    for run in weights_program(400):
        live = Live()
        with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
            gradient, states = run()
        results.append(gradient)
        bytes_held.append(live.most + states)
    assert error(results[1], results[0]) < 1e-3  # single precision
    assert bytes_held[1] <= 0.25 * bytes_held[0], f"{bytes_held[1] / 1e6:.1f} of {bytes_held[0] / 1e6:.1f} MB"


@pytest.mark.alone
def test_400_steps_in_at_most_1_6_times_the_time():
    plain, checkpointed = weights_program(400, width=128)
    times = {plain: [], checkpointed: []}
    for _ in range(8):
        for run, taken in times.items():
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
    ratio = min(times[checkpointed]) / min(times[plain])  # other work on the machine only ever adds to a time
    assert ratio <= 1.6, times


# Mixtures of levels


def three(kinds, move=0.0):
    "top sees mid and low, mid sees low; `kinds` of mid and low"
    torch.manual_seed(0)
    A, B = (torch.eye(3, dtype=DOUBLE) + 0.1 * torch.randn(3, 3, dtype=DOUBLE) for _ in range(2))  # solved in few steps

    class Low(kinds[1]):
        def training_step(self):
            return 0.5 * (A @ self.module() - self.top().sin()).square().sum() + 0.01 * self.module().pow(4).sum()

    class Mid(kinds[0]):
        def training_step(self):
            return 0.5 * (B @ self.module() - self.low()).square().sum() + 0.01 * self.module().pow(4).sum()

    class Top(ImplicitProblem):
        def training_step(self):
            return (self.mid() - 1).square().sum()

    def level(cls, name, value, **config):
        module = Vector(torch.full((3,), value, dtype=DOUBLE))
        return cls(name, Config(**config), module, torch.optim.SGD(module.parameters(), lr=0.7, momentum=0.05))

    low = level(Low, "low", 0.2, unroll_steps=30, **({"type": "exact"} if kinds[1] is ImplicitProblem else {}))
    mid = level(Mid, "mid", 0.1, unroll_steps=1, **({"type": "exact"} if kinds[0] is ImplicitProblem else {}))
    mid.config.unroll_steps = 30
    top = level(Top, "top", 0.5)
    top.module.value.data[0] += move
    edges = {"u2l": {top: [low]}, "l2u": {low: [mid], mid: [top]}}
    return Engine([top, mid, low], EngineConfig(train_iters=10**6, strategy="cpu"), edges)


@pytest.mark.parametrize(
    "kinds", [(IterativeProblem, ImplicitProblem), (ImplicitProblem, IterativeProblem), (IterativeProblem, IterativeProblem)]
)
def test_iterative_and_implicit_levels_in_one_program(kinds):
    "All levels are solved, so that every method must find the derivative of the solution"
    engine = at_hypergradient(three(kinds), "top")
    gradient = engine.probe("top").total[0][0].item()
    up, down = (at_hypergradient(three(kinds, move), "top").top.loss().item() for move in (1e-4, -1e-4))
    assert abs(gradient - (up - down) / 2e-4) < 1e-5 * abs(gradient)


def test_recurrent_and_tied_parameters():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = torch.nn.GRU(1, 3, batch_first=True), torch.nn.Linear(3, 1)
            self.tied = self.out

        def forward(self, x):
            return self.tied(self.rnn(x[:, :, None])[0][:, -1]) + self.out.bias

    def options():
        torch.manual_seed(0)
        return dict(net=Net().double(), make=torch.optim.Adam)

    engine = at_hypergradient(program(**options()))
    reverse, solve = probed(engine)
    assert solve.status == "fixed"
    loss = lambda h: at_hypergradient(program(h, **options())).outer.loss().item()  # noqa: E731
    difference = torch.tensor([(loss(START + 1e-5 * e) - loss(START - 1e-5 * e)) / 2e-5 for e in torch.eye(6, dtype=DOUBLE)], dtype=DOUBLE)
    assert error(reverse, difference) < 1e-6


def test_attention_has_second_derivatives_in_steps_made_with_their_graph():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = torch.nn.Linear(1, 4), torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.nn.Linear(4, 1)

        def forward(self, x):
            tokens = self.embed(x[:, :, None])
            return self.out(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    engine = at_hypergradient(program(torch.full((8,), -2.0, dtype=DOUBLE), net=Net().double()))
    assert engine.inner.path.stretches[-1].live is not None
    made_and_repeated(engine)


def test_a_graph_that_takes_too_much_is_not_kept():
    engine = at_hypergradient(program(config=Config(unroll_steps=2000)))
    size = engine.inner.path.stretches[0]
    assert size.live is not None and size.length == engine.inner.longest
    wide = torch.nn.Sequential(torch.nn.Linear(4, 2000), torch.nn.Tanh(), torch.nn.Linear(2000, 1)).double()  # 0.4 MB of parameters and state a step
    engine = program(net=wide, config=Config(unroll_steps=2000))
    engine.advance(), engine.advance()
    assert engine.inner.path.stretches[0].live is None and engine.inner.path.stretches[0].length == 44


@pytest.mark.parametrize("truncate", [0, 4])
def test_the_graph_of_an_unroll_goes_when_the_next_begins(truncate):
    engine, graphs = program(config=Config(type=Unroll(truncate=truncate), unroll_steps=10)), []
    collecting = gc.isenabled()
    gc.disable()  # or it would clear up sooner or later, when a GPU may be full
    try:
        for _ in range(40):
            engine.run(1)
            graphs += [weakref.ref(stretch.live) for stretch in engine.inner.path.stretches if stretch.live is not None]
        alive = {id(graph()) for graph in graphs if graph() is not None}
        assert alive == {id(stretch.live) for stretch in engine.inner.path.stretches if stretch.live} and len(alive) < len({id(graph) for graph in graphs})
    finally:
        if collecting:
            gc.enable()


@pytest.mark.parametrize("truncate", [0, 4])
def test_a_run_uses_up_the_graph_of_an_unroll_that_is_over(truncate, monkeypatch):
    run, watched, stepped, failed = (program(config=Config(type=Unroll(truncate=truncate), unroll_steps=10)) for _ in range(4))
    watched.watchers.append(Watching())
    run.run(20), watched.run(20)
    while stepped.completed < 20:
        stepped.advance()
    held = [engine.inner.path.stretches[-1].live is not None for engine in (run, watched, stepped)]
    assert held == [False, True, True], "who watches or steps by hand may ask for it again"
    assert error(probed(run)[0], probed(watched)[0]) < 1e-10

    def fails(*args, **options):
        monkeypatch.undo()
        raise KeyboardInterrupt

    failed.run(9)
    for name in ("derivative", "pass_back"):
        monkeypatch.setattr(f"betty_nb.hypergradient.unroll.{name}", fails)
    with pytest.raises(KeyboardInterrupt):
        failed.run(11)
    assert failed.next_action.kind == "hypergradient", "still due, though the graph is gone"
    failed.run(20 - failed.completed)
    assert same(bits(run), bits(watched)) and same(bits(run), bits(stepped)) and same(bits(run), bits(failed))


class Direct(Outer):
    def training_step(self, batch):
        return super().training_step(batch) + 0.1 * self.module().square().sum()


class Unmoved(Outer):
    "Its loss does not depend on the level below"

    def training_step(self, batch):
        return self.module().square().sum()


class Wild(Inner):
    "The derivative of its loss is infinite"

    def training_step(self, batch):
        return super().training_step(batch) + (0 * self.outer()).sqrt().sum() * self.module[0].weight.sum()


class Started(Inner):
    def initial_parameters(self):
        return [p.detach() + 0.01 * self.outer().sum() for p in self.trainable_parameters()]


AT_ONCE = {  # options of a program, and whether its hypergradients are taken without a sweep
    "plain": ({}, True),
    "a direct part": (dict(outer=Direct), True),
    "no indirect part": (dict(outer=Unmoved), True),
    "clipped and accumulated": (dict(config=Config(unroll_steps=3, gradient_accumulation=2)), True),
    "Adam": (dict(make=torch.optim.Adam, noise=True), True),
    "non-finite": (dict(cls=Wild), True),
    "first order": (dict(config=Config(type=Unroll(first_order=True), unroll_steps=5)), True),
    "truncated": (dict(config=Config(type=Unroll(truncate=3), unroll_steps=5)), False),
    "repeated": (dict(config=Config(type=Unroll(graph_mb=0), unroll_steps=5)), False),
    "from a point that is learned": (dict(cls=Started), False),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_hypergradient_without_a_sweep_has_the_bits_of_one_with(name, monkeypatch):
    (options, expected), found, original = AT_ONCE[name], [], Unroll.at_once
    monkeypatch.setattr(Unroll, "at_once", lambda *args: found.append(original(*args)) or found[-1])
    at_once, swept = program(**options), program(**options)
    for engine in (at_once, swept):
        engine.outer.config.log_step = 2
        torch.manual_seed(2)
        engine.run(31)
        monkeypatch.setattr(Unroll, "at_once", lambda *args: None)
    assert {f is not None for f in found} == {expected}
    assert everything(at_once) == everything(swept) and same(bits(at_once), bits(swept))
    assert name != "non-finite" or (at_once.outer.module.value == START).all()


def test_no_graph_is_used_up_in_the_middle_of_an_unroll():
    class Impatient(Engine):
        def train_step(self):
            self.inner.step()
            if self.inner.count % 5 == 0 and self.inner.count % 10:
                self.outer.step()

    engine = program(config=Config(type="unroll", unroll_steps=10))
    engine = Impatient(engine.problems, engine.config, BOTH)
    engine.run(16)
    assert engine.outer.count == 3 and engine.inner.path.stretches[-1].live.steps == 6


def test_a_pass_that_fails_leaves_nothing_in_the_graph():
    class Partly(Inner):
        def training_step(self, batch):
            return self.module[0](batch[0]).square().mean() + self.outer().exp().sum() * self.module[0].weight.square().sum()

    plain, failed = program(cls=Partly), program(cls=Partly)
    failed.run(3)  # in the middle of an unroll: at its beginning the graph is a new one anyway
    failed.inner.config.allow_unused = False
    failed.advance()
    for _ in range(2):
        with pytest.raises(ValueError, match="does not use its parameter"):
            failed.advance()
    failed.inner.config.allow_unused = True
    plain.run(13), failed.run(13 - failed.completed)
    assert failed.inner.path.stretches[-1].live is not None
    assert same(bits(plain), bits(failed))


def test_a_change_by_hand_or_of_the_options_ends_the_graph():
    engine = program(make=torch.optim.Adam)
    engine.run(3)
    with torch.no_grad():
        engine.inner.module[0].weight.mul_(2)
    engine.run(1)
    assert engine.inner.path.stretches[-1].live is None
    engine = program(make=torch.optim.Adam)
    engine.run(3)
    engine.inner.config.gradient_clipping = 1e-3  # which no formula knows
    engine.run(1)
    assert engine.inner.path.stretches[-1].live is None
    assert probed(at_hypergradient(engine))[1].iterations == 10


def exchange_layer(inner, outer):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        inner.module[0] = torch.nn.Linear(4, 5).double()
    inner.optimizer.param_groups[0]["params"] = list(inner.module.parameters())


def exchange_parameter(inner, outer):
    inner.module[0].weight = torch.nn.Parameter(inner.module[0].weight.detach() / 2)
    inner.optimizer.param_groups[0]["params"] = list(inner.module.parameters())


def exchange_above(inner, outer):
    outer.module.value = torch.nn.Parameter(START / 2)
    outer.optimizer = torch.optim.SGD(outer.module.parameters(), lr=0.1)


def exchange_module_above(inner, outer):
    outer.module = Vector(START / 2)
    outer.optimizer = torch.optim.SGD(outer.module.parameters(), lr=0.1)


def exchange_optimizer(inner, outer):
    inner.optimizer = torch.optim.SGD(inner.module.parameters(), lr=0.05)


def freeze(inner, outer):
    inner.module[0].requires_grad_(False)


def move_table(inner, outer):
    inner.module[0]._parameters = dict(inner.module[0]._parameters)


@pytest.mark.parametrize("graph_mb", [512, 0])
@pytest.mark.parametrize(
    "change", [exchange_layer, exchange_parameter, exchange_above, exchange_module_above, exchange_optimizer, freeze, move_table], ids=lambda f: f.__name__
)
def test_what_is_exchanged_between_unrolls_is_noticed(change, graph_mb):
    def made(**own):
        return program(config=Config(type=Unroll(graph_mb=graph_mb), unroll_steps=4), **own)

    old = made()
    old.run(8)
    change(old.inner, old.outer)
    new = made(net=copy.deepcopy(old.inner.module), h=old.outer().detach(), lr=old.inner.optimizer.param_groups[0]["lr"])
    before = old.outer().detach().clone()
    for engine in (old, new):
        engine.run(8)
    assert not torch.equal(old.outer(), before)
    for a, b in zip((old.inner, old.outer), (new.inner, new.outer)):
        for p, q in zip(a.module.parameters(), b.module.parameters()):
            assert torch.equal(p, q)


def test_hooks_written_for_no_grad_are_differentiated():
    class Hooked(Inner):
        def grad_callback(self):
            torch.nn.utils.clip_grad_norm_(self.trainable_parameters(), 0.5)

        def custom_optimizer_step(self):
            with torch.no_grad():
                for p in self.trainable_parameters():
                    if p.grad is not None:
                        p.data.sub_(0.2 * p.grad / (1 + p.grad.norm()))

        def param_callback(self):
            for p in self.module.parameters():
                p.data.clamp_(-0.15, 0.15)

    options = dict(cls=Hooked, h=START - 4)
    engine = at_hypergradient(program(**options))
    assert (engine.inner.module[0].weight.abs() == 0.15).any()
    assert error(probed(engine)[0], central(**options)) < 1e-6


# Steps in a row


class Watching:
    "A watcher that only looks, and so has every step made one by one"

    def before(self, action):
        pass

    def after(self, action):
        pass


class Counting(Inner):
    "Its loss depends on everything that counts steps"

    def training_step(self, batch):
        return super().training_step(batch) * (1 + 0.1 * self.count + 0.01 * self.steps + 0.001 * self.engine.global_step)


def shuffled():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:14], Y[:14]), batch_size=4, shuffle=True)


IN_A_ROW = {
    "counters": dict(cls=Counting),
    "dropout and BatchNorm": dict(noise=True, make=torch.optim.Adam, loader=shuffled),
    "truncated": dict(make=torch.optim.Adam, config=lambda: Config(unroll_steps=12, type=Unroll(truncate=5))),
    "first order": dict(config=lambda: Config(unroll_steps=6, type=Unroll(first_order=True)), momentum=0.9),
    "logging": dict(config=lambda: Config(unroll_steps=10, log_step=4)),
    "two groups": dict(make=lambda net, top: torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}], lr=0.1)),
}


def in_a_row(watched=False, **options):
    engine = program(**{k: v() if k in ("config", "loader") else v for k, v in options.items()})
    engine.watchers += [Watching()] * watched
    torch.manual_seed(2)
    return engine


@pytest.fixture
def rows(monkeypatch):
    "A list that receives the number of steps made in each row"
    made, original = [], Row._restore
    monkeypatch.setattr(Row, "_restore", lambda row: (original(row), made.append(row.made)))
    return made


def everything(engine):
    inner = engine.inner
    path = [(step.options, step.passes[0].counters) for stretch in inner.path.stretches for step in stretch.steps]
    return engine.global_step, engine.next_action, inner.count, inner.steps, inner.drawn, inner.last_loss.item(), engine.outer.count, path


@pytest.mark.parametrize("name", IN_A_ROW)
def test_steps_in_a_row_have_the_bits_of_single_ones(name, rows):
    one_by_one, row = in_a_row(True, **IN_A_ROW[name]), in_a_row(**IN_A_ROW[name])
    torch.manual_seed(2)
    for steps in (1, 7, 18, 25):
        one_by_one.run(steps)
    assert not rows
    torch.manual_seed(2)
    for steps in (1, 7, 18, 25):
        row.run(steps)
    assert max(rows) > 1
    assert everything(one_by_one) == everything(row) and same(bits(one_by_one), bits(row))


def test_a_validation_falls_between_two_rows(rows):
    class Validating(Engine):
        def validation(self):
            self.seen = [*getattr(self, "seen", []), (self.global_step, self.inner.count, self.inner.module[0].weight.sum().item())]

    engines = in_a_row(True), in_a_row()
    for engine in engines:
        engine.__class__, engine.config.valid_step = Validating, 4
        engine.run(22)
    assert rows and engines[0].seen == engines[1].seen and [step for step, _, _ in engines[1].seen] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("where", ["the fifth loss", "the sixth batch"])
def test_a_failure_in_a_row_is_as_one_in_a_single_step(where, rows):
    def failing(watched):
        class Failing(Inner):
            fails = where == "the fifth loss"

            def training_step(self, batch):
                loss = super().training_step(batch)
                if self.count == 4 and self.fails:
                    raise ArithmeticError("bad luck")
                return loss

        class Batches:
            fails = where == "the sixth batch"

            def __iter__(self):
                for i in range(100):
                    while i == 5 and self.fails:
                        self.fails = False
                        raise OSError("bad luck")
                    yield X[i % 7 :][:7], Y[i % 7 :][:7]

        engine = in_a_row(watched, cls=Failing, loader=Batches, noise=True)
        with pytest.raises((ArithmeticError, OSError), match="bad luck"):
            engine.run(23)
        failed = everything(engine), engine.completed, bits(engine)
        engine.inner.fails = False
        engine.run(23 - engine.completed)
        return failed, everything(engine), bits(engine)

    (at, completed, now), end, then = failing(True)
    assert not rows
    (row_at, row_completed, row_now), row_end, row_then = failing(False)
    assert rows
    assert (row_at, row_completed, row_end) == (at, completed, end) and same(now, row_now) and same(then, row_then)


def test_a_row_ends_where_it_is_asked_to(rows, tmp_path):
    class Stopping(Inner):
        def training_step(self, batch):
            if self.count == 3:
                self.engine.stop()
            if self.count == 6:
                self.engine.save(tmp_path / "at_7.pt")
            return super().training_step(batch)

    engines = in_a_row(True, cls=Stopping), in_a_row(cls=Stopping)
    for engine in engines:
        engine.run(20)
        assert engine.completed == 4
        engine.run(5)
        assert engine.completed == 9
    assert rows and everything(engines[0]) == everything(engines[1]) and same(bits(engines[0]), bits(engines[1]))
    saved = in_a_row(cls=Inner)
    saved.load(tmp_path / "at_7.pt")
    assert saved.completed == 7


def test_whoever_draws_a_batch_sees_the_parameters_themselves(rows):
    seen = []

    class Looking:
        def __iter__(self):
            for _ in range(100):
                inner = seen[0]
                seen.append((all(isinstance(p, torch.nn.Parameter) for p in inner.module.parameters()), type(inner.optimizer), inner.optimizer is optimizer))
                yield X[:7], Y[:7]

    engine = in_a_row(loader=Looking)
    optimizer = engine.inner.optimizer
    seen.append(engine.inner)
    engine.run(20)
    assert max(rows) == 10 and set(seen[1:]) == {(True, torch.optim.SGD, True)}


def test_a_hook_of_the_optimizer_sees_the_steps_from_when_it_is_there(rows):
    engine, seen = in_a_row(make=torch.optim.Adam), []
    engine.run(3)
    engine.inner.optimizer.register_step_post_hook(lambda *args: seen.append(engine.inner.count))
    engine.run(6)
    assert sum(rows) == 3 and seen == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("hook", ["param_callback", "grad_callback", "epoch_callback", "update", "rate", "rate as a tensor"])
def test_what_is_to_be_done_between_two_steps_is_done(hook, rows):
    def engine(watched):
        class Hooked(Inner):
            calls = 0

            def training_step(self, batch):
                if hook.startswith("rate"):
                    rate = 0.1 / (1 + self.count)
                    optimizer.param_groups[0]["lr"] = rate if hook == "rate" or self.count % 4 else torch.tensor(rate)
                return super().training_step(batch)

        if hook != "rate":

            def called(self):
                self.calls += 1
                return getattr(super(Hooked, self), hook)()

            setattr(Hooked, hook, called)
        engine = in_a_row(watched, cls=Hooked, noise=True)
        optimizer = engine.inner.optimizer
        engine.run(23)
        return engine

    single, row = engine(True), engine(False)
    assert single.inner.calls == row.inner.calls and everything(single) == everything(row) and same(bits(single), bits(row))
    assert hook.startswith("rate") or (row.inner.calls > 10 and not rows)


# Faults


def test_a_step_that_cannot_be_repeated_is_reported():
    generator = torch.Generator().manual_seed(0)

    class Own(Inner):
        def training_step(self, batch):
            return super().training_step(batch) * (1 + torch.rand((), generator=generator, dtype=DOUBLE))

    solve = probed(at_hypergradient(program(cls=Own, config=Config(unroll_steps=10, type=Unroll(graph_mb=0)))))[1]
    assert solve.status == "not reproduced" and "generator" in solve.advice
    assert probed(at_hypergradient(program(cls=Own)))[1].status == "fixed", "steps made with their graph need not be repeated"


def test_counters_and_slow_generators_are_repeated():
    import random

    class Annealed(Inner):
        def training_step(self, batch):
            return super().training_step(batch) * (1 + random.random() + 0.1 * self.count)

    random.seed(0)
    assert probed(at_hypergradient(program(cls=Annealed, config=Config(unroll_steps=70))))[1].status == "fixed"


def test_nothing_unrolled_yet():
    gradient, solve = probed(program())
    assert solve.status == "no steps" and gradient.norm() == 0


def test_divergence_is_reported():
    gradient, solve = probed(at_hypergradient(program(lr=1e40)))
    assert solve.status in ("non-finite", "not reproduced") and gradient.isfinite().all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="Level 'inner' can't be an IterativeProblem: the steps of Rprop"):
        program(make=torch.optim.Rprop)
    with pytest.raises(ValueError, match="LBFGS evaluates the loss several times"):
        program(make=torch.optim.LBFGS)
    for refused in ("SparseAdam", "Adafactor"):
        with pytest.raises(ValueError, match=refused):
            program(make=getattr(torch.optim, refused))
    with pytest.raises(ValueError, match="Level 'inner': cg differentiates the optimum of a level, so it is for an ImplicitProblem"):
        program(config=Config(type="cg"))

    class Implicit(ImplicitProblem):
        training_step = Inner.training_step

    with pytest.raises(ValueError, match="Level 'inner': unroll differentiates the steps of an unroll, so it is for an IterativeProblem"):
        program(cls=Implicit, config=Config(type="unroll"))
    engine = at_hypergradient(program())
    with pytest.raises(ValueError, match="for an ImplicitProblem"):
        engine.probe("outer", methods={"inner": Config(type="cg").method})
    with pytest.raises(ValueError, match="over its limit of 2"):
        probed(engine, ForwardMode(limit=2))
    debugger = Debugger(engine)
    with pytest.raises(ValueError, match="can't be used on level 'inner'"):
        debugger.swap("inner", "cg")
    debugger.swap("inner", "unroll", truncate=3)
    rows = debugger.compare("outer", ["forward_mode", "cg"]).rows
    assert rows[1].error < 1e-10 and rows[2].error is None and "ImplicitProblem" in rows[2].status
    assert debugger.hypergradient("outer").error > 0, "truncated, compared with the whole unroll"
