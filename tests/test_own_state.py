"""What the code of a level keeps for itself: counters, histories, averages. Passes for a hypergradient neither disturb it nor are disturbed by it."""

import collections
import copy
import pickle
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from betty_nb import Config, Debugger, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.hypergradient import METHODS, Unroll, make_method
from betty_nb.problems.compiled import CompileWarning
from tests.programs import BOTH, Vector

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))


class Loss:
    weight = 1.0

    def training_step(self, batch):
        x, y = batch
        return self.weight * (F.cross_entropy(self.module(x), y) + self.outer().exp().sum() * self.module[0].weight.square().sum())


class Outer(ImplicitProblem):
    def training_step(self, batch):
        return F.cross_entropy(self.inner(batch[0]), batch[1])


def program(own, method, rate=0.1, roll_back=False, **config):
    "`own`: a class that is mixed into the lower level"
    method = make_method(method)
    torch.manual_seed(0)
    net, top = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)), Vector(2, -2.0)
    base = IterativeProblem if method.serves == "iterative" else ImplicitProblem
    data = [(X[:16], Y[:16]), (X[16:], Y[16:])]
    inner = type("Inner", (own, Loss, base), {})(
        "inner", Config(type=method, unroll_steps=3, **config), net, torch.optim.Adam(net.parameters(), lr=0.05), train_data_loader=data
    )
    outer = Outer("outer", None, top, torch.optim.SGD(top.parameters(), lr=rate), train_data_loader=data)
    return Engine([outer, inner], EngineConfig(train_iters=1000, strategy="cpu", roll_back=roll_back), BOTH)


def values(engine):
    return torch.cat([p.detach().reshape(-1) for problem in engine.problems for p in problem.module.parameters()])


class Counting:
    "Its loss depends on how often it was computed, and is collected"

    def training_step(self, batch):
        if not hasattr(self, "calls"):
            self.calls, self.losses, self.by_name, self.norm = 0, [], collections.defaultdict(list), torch.nn.BatchNorm1d(6)
        self.calls += 1
        self.norm(batch[0])
        loss = super().training_step(batch) * (1 + 0.1 * self.calls)
        self.losses.append(loss.item())
        self.by_name["loss"].append(loss.item())
        return loss


class Counted:
    "The same loss, by the counter that every level has"

    def training_step(self, batch):
        return super().training_step(batch) * (1 + 0.1 * (self.count + 1))


def same_steps(own, other, method, steps=12, **options):
    "The program with `own`, which makes the same steps as that with `other`"
    mine, plain = program(own, method, **options), program(other, method, **options)
    for engine in (mine, plain):
        torch.manual_seed(1)
        engine.run(steps)
    assert torch.equal(values(mine), values(plain))
    return mine


WAYS = [*METHODS, Unroll(graph_mb=0), Unroll(truncate=2), Unroll(first_order=True)]


@pytest.mark.parametrize("method", WAYS, ids=str)
def test_a_counter_and_what_is_collected(method):
    mine = same_steps(Counting, Counted, method)
    debugger = Debugger(mine)
    for _ in range(2):
        inner = mine.inner
        assert (inner.calls, len(inner.losses), len(inner.by_name["loss"]), inner.norm.num_batches_tracked.item()) == (12, 12, 12, 12)
        result = debugger.hypergradient("outer")  # also with a reference, and its memory
        debugger.diagnose(seconds=2)
    if make_method(method) == Unroll() or make_method(method) == Unroll(graph_mb=0):
        assert result.error < 1e-5


class Remembering(Counting):
    "Its loss depends on a teacher, on noise from a generator of its own, and on a running mean; a large tensor is written to as well"

    def training_step(self, batch):
        if not hasattr(self, "teacher"):
            self.teacher = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
            self.mean, self.noise, self.large, self.data = torch.zeros(6), torch.Generator().manual_seed(3), torch.zeros(17_000_000), torch.zeros(17_000_000)
        self.mean += 0.1 * batch[0].mean(0)
        self.large[0] += 1
        away = (self.module(batch[0]) - self.teacher(batch[0] - self.mean).detach()).square().mean()
        return super().training_step(batch) + away * torch.rand((), generator=self.noise)

    def param_callback(self):
        for a, p in zip(self.teacher.parameters(), self.module.parameters()):
            a.data.mul_(0.9).add_(p.data, alpha=0.1)


def kept(engine):
    inner = engine.inner
    found = [*values(engine), *inner.mean, *inner.noise.get_state(), *(v for p in inner.teacher.parameters() for v in p.detach().reshape(-1))]
    return torch.stack([v.double() for v in found]), inner.calls, list(inner.losses), dict(inner.by_name)


@pytest.mark.parametrize("method", ["cg", "darts", "unroll"])
def test_going_back_takes_it_back(method):
    engine = program(Remembering, method)
    engine.run(4)
    debugger = Debugger(engine)
    moments = {}
    for _ in range(12):
        moments[debugger.timeline.index] = kept(engine)
        debugger.step()
        debugger.timeline.take()
    end, large = kept(engine), engine.inner.large[0].item()
    for moment in (list(moments)[2], list(moments)[9], list(moments)[5]):
        debugger.timeline.goto(moment)
        for a, b in zip(kept(engine), moments[moment]):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    debugger.timeline.goto(debugger.timeline.end)
    assert torch.equal(kept(engine)[0], end[0]) and kept(engine)[1:] == end[1:]
    assert engine.inner.large[0].item() == large  # seen to change, so that it is copied
    assert debugger.timeline.nbytes < 300e6  # what never changes, data for example, is not


class Weighed:
    "`factor` is an option: no code of the level assigns to it but the first"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor, self.calls, self.losses = 1.0, 0, []

    def training_step(self, batch):
        self.calls += 1
        self.losses.append(self.calls)
        return super().training_step(batch) * self.factor


@pytest.mark.parametrize("method", ["neumann", "darts", Unroll(graph_mb=0)], ids=str)
def test_an_option_that_is_set_during_a_run_stays_set(method):
    engine = program(Weighed, method)
    run = Debugger(engine).run()
    try:
        for i in range(300):
            engine.inner.factor = 1.0 + i / 1000
            time.sleep(2e-3)
            assert engine.inner.factor == 1.0 + i / 1000
    finally:
        run.pause()
        run.wait(30)
    assert engine.inner.calls == engine.inner.count == len(engine.inner.losses)


def test_a_number_changed_by_hand_belongs_to_its_moment():
    class Weighted:
        factor = 1.0

        def training_step(self, batch):
            return super().training_step(batch) * self.factor

    engine = program(Weighted, "darts")
    engine.inner.factor = 0.5
    debugger = Debugger(engine)
    debugger.run(3).wait(30)
    before, moment = values(engine), debugger.timeline.index
    engine.inner.factor = 2.0
    debugger.run(3).wait(30)
    after = values(engine)
    debugger.timeline.goto(moment - 1)
    assert engine.inner.factor == 0.5
    debugger.timeline.goto(moment)
    assert torch.equal(values(engine), before) and engine.inner.factor == 2.0
    debugger.timeline.goto(debugger.timeline.end)
    assert torch.equal(values(engine), after)


@pytest.mark.parametrize("method", ["darts", "cg", "unroll"])
def test_a_counter_of_steps_that_are_rolled_back(method):
    assert same_steps(Counting, Counted, method, steps=9, roll_back=True).inner.calls == 9


class InPlace:
    "It writes to a mean in its training_step, on which its loss depends, and to a teacher, the second through .data"

    def training_step(self, batch):
        if not hasattr(self, "mean"):
            self.mean, self.teacher, self.by_name = torch.zeros(6), torch.nn.Linear(6, 5), {"mean": torch.zeros(6)}
        self.mean.mul_(0.9).add_(batch[0].mean(0), alpha=0.1)
        self.by_name["mean"] += batch[0].mean(0)
        for a, p in zip(self.teacher.parameters(), self.module[0].parameters()):
            a.data.mul_(0.9).add_(p.data, alpha=0.1)
        return super().training_step((batch[0] - self.mean - 0.01 * self.by_name["mean"], batch[1]))


class OutOfPlace:
    "The same from a list of batches that it knows, without keeping anything"

    def training_step(self, batch):
        mean, total = torch.zeros(6), torch.zeros(6)
        for now in [*(X[16 * (i % 2) : 16 * (i % 2) + 16].mean(0) for i in range(self.count)), batch[0].mean(0)]:
            mean.mul_(0.9).add_(now, alpha=0.1)
            total += now
        return super().training_step((batch[0] - mean - 0.01 * total, batch[1]))


@pytest.mark.parametrize("method", ["cg", "darts", "sama", "neumann", "nystrom", "evolution", "unroll"])
def test_tensors_to_which_a_training_step_writes(method):
    mine = same_steps(InPlace, OutOfPlace, method)
    inner = mine.inner
    before = [t.clone() for t in (inner.mean, inner.by_name["mean"], *inner.teacher.state_dict().values())]
    debugger = Debugger(mine)
    debugger.hypergradient("outer")
    debugger.diagnose(seconds=2)
    for a, b in zip(before, (inner.mean, inner.by_name["mean"], *inner.teacher.state_dict().values())):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hessian", ["direct", "total"])
def test_a_counter_in_the_middle_of_three_levels(hessian):
    def three(own):
        class Low(ImplicitProblem):
            def training_step(self):
                return (self.module() - self.middle()).square().sum() + 0.1 * self.module().square().sum()

        class Base:
            def training_step(self, batch):
                return (self.low() - 0.5).square().sum() + (self.module() * self.top().exp()).square().sum()

        class Top(ImplicitProblem):
            def training_step(self):
                return (self.middle() - 1.0).square().sum()

        middle = type("Middle", (own, Base, ImplicitProblem), {})
        levels = {}
        for name, cls, config in (("top", Top, None), ("middle", middle, Config(type="cg", hessian=hessian, unroll_steps=2)), ("low", Low, Config(type="cg", unroll_steps=2))):
            module = Vector(2, 0.3)
            loader = [0] if name == "middle" else None
            levels[name] = cls(name, config, module, torch.optim.SGD(module.parameters(), lr=0.1), train_data_loader=loader)
        top, middle, low = levels.values()
        edges = {"u2l": {top: [middle], middle: [low]}, "l2u": {low: [middle], middle: [top]}}
        return Engine([top, middle, low], EngineConfig(train_iters=1000, strategy="cpu"), edges)

    class Counts:
        def training_step(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            return super().training_step(batch) * (1 + 0.1 * self.calls)

    mine, plain = three(Counts), three(Counted)
    for engine in (mine, plain):
        engine.run(12)
    assert torch.equal(values(mine), values(plain)) and mine.middle.calls == mine.middle.count == 6


def by_foreach(self):
    if not hasattr(self, "average"):
        self.average = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    self.average.update_parameters(self.module)


def by_torch(self):
    if not hasattr(self, "average"):
        self.average = AveragedModel(self.module)
    self.average.update_parameters(self.module)


def in_place(self):
    if not hasattr(self, "average"):
        self.average = copy.deepcopy(self.module)
    with torch.no_grad():
        for a, p in zip(self.average.parameters(), self.module.parameters()):
            a.mul_(0.9).add_(p, alpha=0.1)


def through_data(self):
    if not hasattr(self, "average"):
        self.average = copy.deepcopy(self.module)
    for a, p in zip(self.average.parameters(), self.module.parameters()):
        a.data = 0.9 * a.data + 0.1 * p.data


def through_a_view(self):
    if not hasattr(self, "average"):
        self.average = copy.deepcopy(self.module)
    for a, p in zip(self.average.parameters(), self.module.parameters()):
        a.data.view(-1).lerp_(p.data.view(-1), 0.1)


def by_name(self):
    with torch.no_grad():
        if not hasattr(self, "values"):
            self.values, self.average = {n: p.clone() for n, p in self.module.named_parameters()}, copy.deepcopy(self.module)
        for n, p in self.module.named_parameters():
            self.values[n] = 0.9 * self.values[n] + 0.1 * p
        self.average.load_state_dict(self.values)


def as_a_vector(self):
    with torch.no_grad():
        now = torch.nn.utils.parameters_to_vector(self.module.parameters())
        if not hasattr(self, "average"):
            self.average, self.vector = copy.deepcopy(self.module), now.clone()
        self.vector += 0.1 * (now - self.vector)
        torch.nn.utils.vector_to_parameters(self.vector, self.average.parameters())


def latest(self):
    self.average = copy.deepcopy(self.module)


@pytest.mark.parametrize("average", [by_foreach, by_torch, in_place, through_data, through_a_view, by_name, as_a_vector, latest], ids=lambda f: f.__name__)
def test_an_average_of_the_weights_of_an_unrolled_level(average):
    own = type("Averaging", (), {"param_callback": average})
    unrolled, plain = program(own, "unroll", rate=0.0), program(own, "darts", rate=0.0)  # nothing is learned above, so the steps below are the same
    for engine in (unrolled, plain):
        engine.run(9)
    debugger = Debugger(unrolled)
    assert debugger.hypergradient("outer").error < 1e-5
    found = [[t.detach() for t in engine.inner.average.state_dict().values()] for engine in (unrolled, plain)]
    for a, b in zip(*found):
        assert torch.equal(a, b)
    assert not any(t.grad_fn for t in (*unrolled.inner.average.parameters(), *getattr(unrolled.inner, "values", {}).values()))


def test_a_copy_of_the_module_in_a_training_step():
    class Teacher:
        def training_step(self, batch):
            teacher = copy.deepcopy(self.module)
            return super().training_step(batch) + (self.module(batch[0]) - teacher(batch[0]).detach()).square().mean()

    program(Teacher, "cg").run(6)
    for method in (Unroll(), Unroll(graph_mb=0, checkpoint=3)):
        with pytest.raises(RuntimeError, match="The training_step of 'inner' calls copy.deepcopy .* load_state_dict"):
            program(Teacher, method).run(6)

    class Fixed:
        def training_step(self, batch):
            if not hasattr(self, "teacher"):
                self.teacher = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
            self.teacher.load_state_dict(self.module.state_dict())
            return super().training_step(batch) + (self.module(batch[0]) - self.teacher(batch[0]).detach()).square().mean()

    engine = program(Fixed, "unroll")
    engine.run(6)
    before = [p.detach().clone() for p in engine.inner.teacher.parameters()]
    assert Debugger(engine).hypergradient("outer").error < 1e-5
    assert all(map(torch.equal, engine.inner.teacher.parameters(), before)), "looking leaves a teacher alone that training_step writes to"


def test_compiled_products_count_once():
    class Counts:
        def training_step(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            return super().training_step(batch) * (1 + 0.1 * self.calls)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        compiled, usual = program(Counts, "cg", compile="now"), program(Counts, "cg")
        for engine in (compiled, usual):
            engine.run(9)
    assert compiled.inner.compiled.programs and compiled.inner.calls == 9
    assert (values(compiled) - values(usual)).abs().max() < 1e-6


@pytest.mark.parametrize("compile", [True, "now"])
def test_a_level_that_collects_is_not_compiled_for_each_step_anew(compile):
    class Collects:
        def training_step(self, batch):
            if not hasattr(self, "losses"):
                self.losses = []
            loss = super().training_step(batch)
            self.losses.append(loss.detach())
            return loss

    engine = program(Collects, "darts", compile=compile)
    with pytest.warns(CompileWarning, match="puts something into self.losses each time"):
        engine.run(9)
    assert len(engine.inner.losses) == 9 and sum(p.variants for p in engine.inner.compiled.programs.values()) == 0


def test_a_level_that_keeps_something_once_is_compiled():
    class Keeps:
        def training_step(self, batch):
            if self.steps == 2:
                self.kept = [torch.ones(3)]
            return super().training_step(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = program(Keeps, "darts", compile="now")
        engine.run(9)
    assert sum(p.variants for p in engine.inner.compiled.programs.values()) > 0


def test_data_with_missing_values_is_not_taken_for_something_written_to():
    class Holds:
        def training_step(self, batch):
            if not hasattr(self, "data"):
                self.data = torch.tensor([1.0, float("nan")]).expand(3, 2)  # nobody can write to it
            return super().training_step(batch)

    engine = program(Holds, "darts")
    engine.run(6)
    assert not engine.inner._written.surely(engine.inner.data) and engine.inner.data._version == 0


def test_a_tensor_that_has_become_another_one_is_put_back():
    class Grows:
        def training_step(self, batch):
            if not hasattr(self, "seen"):
                self.seen = torch.zeros(2)
            return super().training_step(batch) * (1 + 0.01 * len(self.seen))

        def param_callback(self):
            self.seen.data = torch.cat([self.seen, self.batch[0][0, :1]])

    engine = program(Grows, "darts")
    debugger = Debugger(engine)
    debugger.run(4).wait(30)
    debugger.timeline.take()
    moment, there = debugger.timeline.index, engine.inner.seen.clone()
    debugger.run(4).wait(30)
    end = values(engine)
    debugger.timeline.goto(moment)
    assert torch.equal(engine.inner.seen, there)
    debugger.timeline.goto(debugger.timeline.end)
    assert torch.equal(values(engine), end) and len(engine.inner.seen) == 10


@pytest.mark.parametrize("copying", [copy.deepcopy, copy.copy, pickle.dumps])
def test_an_engine_says_why_it_is_not_copied(copying):
    engine = program(Counted, "unroll")
    engine.run(4)
    with pytest.raises(TypeError, match=r"save\(path\)"):
        copying(engine)
