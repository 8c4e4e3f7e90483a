"""The headless debugger: exact time travel within its memory, forks, breakpoints, and edges declared against actual."""

import gc
import random
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from betty_nb import Config, Debugger, Engine, EngineConfig, Env, ImplicitProblem, IterativeProblem
from betty_nb.app.demo import breast_cancer_program
from tests.programs import BOTH, Level, Vector, bits, level, noisy_program, pair, ridge_program, same

KINDS = ["implicit", "iterative", "roll-back"]


pytestmark = pytest.mark.usefixtures("one_thread")


def program(kind="implicit"):
    "Dropout, BatchNorm, Adam, a scheduler and shuffled loaders, in one of three kinds of programs"
    engine = noisy_program("unroll" if kind == "iterative" else "cg")
    engine.config.roll_back = kind == "roll-back"
    return engine


def straight(kind, iterations):
    "The bits of a program that was only run"
    engine = program(kind)
    engine.run(iterations)
    return bits(engine)


def debugged(engine):
    "A debugger that takes snapshots seldom, so that most of a way back is replay"
    debugger = Debugger(engine)
    debugger.timeline.time_share = 1e-9
    return debugger


def trail(debugger, iterations):
    "Run so many iterations; {moment in actions: bits} along the way"
    found, engine = {debugger.state.index: bits(debugger.engine)}, debugger.engine
    goal = engine.completed + iterations
    while engine.completed < goal:
        engine.advance()
        found[debugger.timeline.index] = bits(engine)
    return found


# Time travel


@pytest.mark.parametrize("kind", KINDS)
def test_back_goto_and_replay_are_exact(kind):
    debugger = debugged(program(kind))
    known = trail(debugger, 14)
    end = debugger.state.index
    debugger.back(9)
    assert same(bits(debugger.engine), known[debugger.state.index]) and debugger.state.can_replay
    here = debugger.state.index
    debugger.replay(n=3)
    assert here < debugger.state.index < end and same(bits(debugger.engine), known[debugger.state.index])
    debugger.step(2)  # the same actions once more: the future is still the one that is known
    assert debugger.state.end == end and same(bits(debugger.engine), known[debugger.state.index])
    debugger.replay()
    assert debugger.state.index == end and same(bits(debugger.engine), known[end])
    assert len(debugger.timeline.snapshots) < end / 2
    for index in random.Random(0).sample(range(end + 1), 8):
        debugger.goto(index)
        assert same(bits(debugger.engine), known[index]), f"moment {index}"
    losses = debugger.history("inner", future=True)
    debugger.engine.run(20 - debugger.engine.completed)  # through the known future and beyond it
    assert same(bits(debugger.engine), straight(kind, 20))
    assert debugger.history("inner")[1][: len(losses[1])] == losses[1], "no loss was noted twice"


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_on_the_way_back_does_not_pass_for_a_moment(kind):
    debugger = debugged(program(kind))
    engine, moments = debugger.engine, trail(debugger, 12)
    last = debugger.timeline.index

    def interrupt(optimizer, args, kwargs):  # the parameters have moved, and nothing else of the action is done
        raise KeyboardInterrupt

    hook = engine.inner.optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        debugger.goto(last - 3)
    hook.remove()
    assert debugger.timeline.index < last - 3
    debugger.goto(last - 3)
    assert same(bits(engine), moments[last - 3])
    debugger.goto(last)
    assert same(bits(engine), moments[last])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_leaves_everything_in_place_and_its_branches_are_runs(kind):
    debugger = debugged(program(kind))
    debugger.run(7).wait()
    before, said = bits(debugger.engine), debugger.state
    one, other = ("unroll", "forward_mode") if kind == "iterative" else ("cg", "darts")
    record = debugger.fork({"inner": one}, {"inner": other}, steps=9)
    assert same(bits(debugger.engine), before) and debugger.state == said
    a, b = record.branches
    assert a.error is None and b.error is None and a.curves[0].indices == b.curves[0].indices
    debugger.take(other)
    assert tuple(debugger.history("inner")[1][-len(b.curves[1].losses) :]) == b.curves[1].losses
    debugger.take(0)
    assert tuple(debugger.history("inner")[1][-len(a.curves[1].losses) :]) == a.curves[1].losses
    assert same(bits(debugger.engine), straight(kind, 16)), "the branch with the method in use is what would have happened"
    debugger.run(4).wait()
    assert same(bits(debugger.engine), straight(kind, 20))


def test_a_fork_ends_when_it_is_paused_and_survives_a_method_that_fails():
    debugger = Debugger(program())
    debugger.step(5)
    before = bits(debugger.engine)
    threading.Timer(0.3, debugger.pause).start()
    record = debugger.fork(methods=["cg", "darts"], steps=1_000_000)
    assert same(bits(debugger.engine), before) and "paused" in record.summary() and 0 < record.steps < 1_000_000

    class Fails(type(debugger.engine.inner)):
        def training_step(self, batch):
            if self.method.name == "darts":
                raise ZeroDivisionError("not with darts")
            return super().training_step(batch)

    debugger.engine.inner.__class__ = Fails
    record = debugger.fork(methods=["cg", "darts"], steps=4)
    assert [b.error for b in record.branches] == [None, "ZeroDivisionError: not with darts"] and same(bits(debugger.engine), before)


class Drawn(ImplicitProblem):
    "Learns the mean of its batches under the penalty of `outer`; counts its epochs into its loss"

    epochs = 0

    def training_step(self, batch):
        return (self() - batch[0].mean(0)).square().sum() + (self.outer() * self()).sum() + 0.01 * self.epochs * self().sum()

    def epoch_callback(self):
        with torch.no_grad():
            self.module.value.add_(0.1)
        torch.rand(1)


class Judge(ImplicitProblem):
    def training_step(self):
        return (self.inner() - 1).square().sum()


def drawing(loader):
    torch.manual_seed(0)
    a, b = Vector(3, 0.0), Vector(3, 0.5)
    inner = Drawn("inner", Config(type="cg", unroll_steps=3), b, torch.optim.Adam(b.parameters(), lr=0.1), train_data_loader=loader())
    return Engine([Judge("outer", None, a, torch.optim.SGD(a.parameters(), lr=0.1)), inner], EngineConfig(strategy="cpu"), BOTH)


def generator():
    while True:
        yield (torch.randn(4, 3),)


def shuffled(**options):
    data = TensorDataset(torch.arange(60.0).reshape(20, 3) / 60)
    return lambda: DataLoader(data, batch_size=4, shuffle=True, **options)


@pytest.mark.parametrize("loader", [generator, shuffled(), shuffled(num_workers=1)], ids=["generator", "shuffled", "workers"])
def test_any_loader_can_be_gone_back_on(loader):
    plain = drawing(loader)
    plain.run(30)
    end = bits(plain)
    debugger = debugged(drawing(loader))
    known = trail(debugger, 18)
    for index in (5, 30, 2, max(known)):
        debugger.goto(index)
        assert same(bits(debugger.engine), known[index])
    debugger.fork(methods=["cg", "darts"], steps=5)
    debugger.back(20)
    debugger.close()  # the batches of the undone steps are not lost
    debugger.engine.run(30 - debugger.engine.completed)
    assert same(bits(debugger.engine), end)


def test_schedules_of_ones_own_and_steps_from_outside_are_replayed():
    class Own(Engine):
        def train_step(self):
            self.inner.step()
            if self.global_step % 3 == 0:
                self.inner.step()

    made = noisy_program()
    engine = Own(made.problems, EngineConfig(train_iters=100, strategy="cpu"), BOTH)
    debugger = debugged(engine)
    known = trail(debugger, 8)
    engine.outer.step()
    debugger.step_level("inner")
    known[debugger.state.index] = end = bits(engine)
    for index in (3, 7, 0, debugger.state.end):
        debugger.goto(index)
        assert same(bits(engine), known[index])
    assert same(bits(engine), end) and debugger.history("inner")[1] == debugger.history("inner", future=True)[1]


def test_changes_from_outside_and_swaps_are_part_of_the_past():
    debugger = debugged(program())
    known = trail(debugger, 6)
    debugger.engine.run(1)
    debugger.engine.inner.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    with torch.no_grad():
        debugger.engine.outer.module.value.add_(1.0)
    debugger.step(4)
    debugger.swap("inner", "darts")
    known |= trail(debugger, 8)
    end = debugger.state.index
    debugger.goto(2)
    assert same(bits(debugger.engine), known[2])
    for index in (end - 6, end):
        debugger.goto(index)
        assert same(bits(debugger.engine), known[index]), "across a swap and a hand on the parameters"
    kinds = [m.kind for m in debugger.timeline_record().marks]
    assert kinds.count("changed") == 1 and kinds.count("swap") == 1 and "update" in kinds


def outside(how):
    "What a notebook does with the random generators between two steps"
    if how == "torch":
        torch.randn(5)
    elif how == "a seed":
        torch.manual_seed(77)
    elif how == "Python and NumPy":
        random.random(), np.random.rand()


@pytest.mark.parametrize("how", ["torch", "a seed", "Python and NumPy"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_drawn_outside_are_part_of_the_past(kind, how):
    "Even before the first step; on the way back from far snapshots each of them is met again"
    debugger = debugged(program(kind))
    known = {}
    for _ in range(5):
        outside(how)
        known[debugger.state.index] = bits(debugger.engine)
        debugger.run(3).wait()
    outside(how)
    end, last = debugger.state.index, bits(debugger.engine)
    assert len(debugger.timeline.snapshots) < 4 and not [m for m in debugger.timeline.marks if m[1] == "changed"]
    for index in (*reversed(known), *known):
        debugger.goto(index)
        assert same(bits(debugger.engine), known[index]), f"moment {index}"
    debugger.goto(0)
    debugger.replay()
    assert debugger.state.index == end and same(bits(debugger.engine), last)
    debugger.goto(0)
    debugger.run(15).wait()  # the same as a run
    assert debugger.state.index == debugger.state.end == end and same(bits(debugger.engine), last)
    debugger.back(2)
    debugger.step(2)
    assert debugger.state.index == debugger.state.end == end and same(bits(debugger.engine), last)


def test_random_numbers_drawn_while_a_future_is_known_leave_it_as_it_is_and_a_seed_makes_another():
    debugger = debugged(program())
    debugger.run(6).wait()
    end, last = debugger.state.index, bits(debugger.engine)
    debugger.back(8)
    here = debugger.state.index
    outside("torch"), outside("Python and NumPy")
    debugger.step(2)
    assert debugger.state.end == end
    outside("torch")
    debugger.replay()
    assert same(bits(debugger.engine), last)
    debugger.goto(here)
    outside("a seed")
    debugger.run(6 - debugger.engine.completed).wait()
    assert not same(bits(debugger.engine), last)
    other, end = bits(debugger.engine), debugger.state.index
    debugger.goto(0)
    debugger.replay()
    assert debugger.state.index == end and same(bits(debugger.engine), other)


def test_random_states_count_as_memory_and_go_with_their_moments():
    debugger = debugged(program())
    debugger.timeline.budget_mb = 0.3
    for _ in range(400):
        outside("torch")
        debugger.step()
    timeline = debugger.timeline
    assert timeline.nbytes <= 0.3 * 2**20 and 0 < len(timeline._random) < 300 and min(timeline._random) >= timeline.oldest
    known = bits(debugger.engine)
    debugger.goto(timeline.oldest)
    debugger.replay()
    assert same(bits(debugger.engine), known)


def test_a_parameter_changed_by_hand_before_the_first_step_is_not_lost():
    debugger = debugged(program())
    with torch.no_grad():
        debugger.engine.inner.module[0].weight.fill_(0.25)
    known = trail(debugger, 3)
    debugger.goto(0)
    assert same(bits(debugger.engine), known[0]) and (debugger.engine.inner.module[0].weight == 0.25).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_upper_level_can_be_stepped_before_anything_else(kind):
    "Its hypergradient passes through a level that has drawn no batch, which looks at its first one and draws it later"
    debugger = Debugger(program(kind))
    debugger.step_level("outer")
    assert debugger.engine.inner.batch is None and debugger.engine.inner.drawn == 0 and debugger.engine.outer.steps == 1
    first = debugger.engine.inner.peek()
    debugger.step()
    assert debugger.engine.inner.drawn == 1 and all(map(torch.equal, debugger.engine.inner.batch, first))


def test_an_upper_level_is_not_stepped_through_a_level_whose_data_cannot_be_looked_at():
    debugger = Debugger(program())
    debugger.engine.inner.train_data_loader = iter(debugger.engine.inner.train_data_loader)
    debugger.engine.inner.reset()
    with pytest.raises(RuntimeError, match="passes through 'inner', which has drawn no batch yet.*make a step of 'inner' first"):
        debugger.step_level("outer")
    debugger.step_level("inner")
    debugger.step_level("outer")


def test_looking_is_not_a_change_from_outside():
    debugger = Debugger(program())
    for _ in range(6):
        debugger.step()
        debugger.hypergradient("outer"), debugger.constraining_sets("inner"), debugger.compare("outer", ["cg", "darts", "sama"], seconds=0)
    assert not [m for m in debugger.timeline_record().marks if m.kind == "changed"]


def test_another_step_another_future():
    debugger = debugged(program())
    debugger.step(12)
    straight_on = debugger.state.end
    debugger.back(6)
    at = debugger.state.index
    debugger.step_level("inner")
    assert debugger.state.end == debugger.state.index == at + 1 < straight_on
    assert debugger.history("inner", future=True)[0][-1] == at + 1
    by_hand = debugger.timeline_record().marks[-1]
    assert (by_hand.kind, by_hand.level, by_hand.index) == ("by hand", "inner", at + 1)
    after = bits(debugger.engine)
    debugger.step(5)
    debugger.goto(at + 1)
    assert same(bits(debugger.engine), after)
    with pytest.raises(ValueError, match="The timeline reaches from action 0 to"):
        debugger.goto(10_000)


def test_an_action_that_failed_can_be_gone_back_on():
    debugger = debugged(program())
    known = trail(debugger, 7)
    original, at = type(debugger.engine.inner).training_step, debugger.state.index

    def failing(self, batch):
        torch.rand(3)
        raise ZeroDivisionError("in the middle")

    type(debugger.engine.inner).training_step = failing
    with pytest.raises(ZeroDivisionError):
        debugger.step()
    type(debugger.engine.inner).training_step = original
    debugger.goto(at - 3)
    assert same(bits(debugger.engine), known[at - 3])
    debugger.replay()
    debugger.engine.run(20 - debugger.engine.completed)
    assert same(bits(debugger.engine), straight("implicit", 20)), "the failure has left no trace"


def test_new_dependencies_begin_a_new_timeline_and_keep_the_batches():
    debugger = debugged(program())
    debugger.step(10)
    debugger.back(4)
    at = debugger.state.index
    debugger.engine.set_dependency(BOTH)
    debugger.step(1)
    assert debugger.timeline.oldest == at
    with pytest.raises(ValueError, match=f"reaches from action {at}"):
        debugger.goto(0)
    debugger.engine.run(20 - debugger.engine.completed)
    assert same(bits(debugger.engine), straight("implicit", 20))


# Memory


def alive():
    "Bytes of all tensors that Python knows of"
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:  # the compiler keeps tensors without memory
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("method, budget", [("darts", 1.5), ("unroll", 1.0)])
def test_the_budget_is_kept_over_10_000_steps_and_every_old_moment_is_exact(method, budget):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    decay = Vector(1, -3.0)

    class Inner(IterativeProblem if method == "unroll" else ImplicitProblem):
        def training_step(self, batch):
            return (self.module(batch[0]) - batch[1]).square().mean() + self.outer().exp().sum() * self.module[0].weight.square().sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return (self.inner(batch[0]) - batch[1]).square().mean()

    loader = lambda: DataLoader(data, batch_size=8, shuffle=True)  # noqa: E731
    momentum = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    inner = Inner("inner", Config(type=method, unroll_steps=20), net, momentum, train_data_loader=loader())
    outer = Outer("outer", None, decay, torch.optim.Adam(decay.parameters(), lr=0.01), train_data_loader=loader())
    engine = Engine([outer, inner], EngineConfig(train_iters=10**6, strategy="cpu"), BOTH)
    before = alive()
    debugger, known, most = Debugger(engine, budget_mb=budget), {}, 0
    debugger.timeline.time_share = 0.1  # many snapshots, so that thinning has work to do

    class Watch:
        def before(self, action):
            pass

        def after(self, action):
            nonlocal most
            index = debugger.timeline.index
            if index % 50 == 0:
                most = max(most, debugger.timeline.nbytes)
            if index % 19 == 0:
                known[index] = bits(engine)

    engine.watchers.append(Watch())
    steps = 10_000 if method == "darts" else 1_000
    debugger.run(steps).wait()
    engine.watchers.pop()
    oldest, snapshots = debugger.timeline.oldest, len(debugger.timeline.snapshots)
    reachable = {i: b for i, b in known.items() if i >= oldest}
    old = [i for i in known if i not in reachable]
    for i in old:
        del known[i]
    held = alive() - before - sum(t.numel() * t.element_size() for b in known.values() for t in b)
    print(
        f"{method}: {steps} steps, {debugger.state.index} actions, most {most / 2**20:.2f} of {budget} MB ({held / 2**20:.2f} MB alive), "
        f"back to {oldest}, {snapshots} snapshots, {len(reachable)} moments tried"
    )
    assert engine.inner.steps == steps and most <= budget * 2**20
    assert held < 1.2 * budget * 2**20 + 60_000, "what is alive agrees with what is counted"
    assert oldest > 0 and len(reachable) >= 4 and snapshots > 4
    tried = 0
    for index in random.Random(1).sample(sorted(reachable), min(8, len(reachable))):
        if index < debugger.timeline.oldest:  # going back and forth takes snapshots too, for which the oldest make room
            continue
        debugger.goto(index)
        tried += 1
        assert same(bits(engine), reachable[index]), f"moment {index}"
    assert tried >= 4
    debugger.goto(debugger.timeline.oldest)
    debugger.goto(max(reachable))
    assert same(bits(engine), reachable[max(reachable)]) and debugger.timeline.nbytes <= budget * 2**20


def acting(steps_per_unroll=3):
    "A program that acts on an environment: a lower level that tracks where a walker is, which its training steps move"

    class Walker(Env):
        def __init__(self):
            super().__init__()
            self.place, self.walked = torch.zeros(3), 0

        def reset(self):
            self.place = torch.zeros(3)

        def step(self, push):
            self.place, self.walked = 0.9 * self.place + push.detach() + 0.1 * torch.randn(3), self.walked + 1
            return self.place

        def state_dict(self):
            return {"place": self.place, "walked": self.walked}

        def load_state_dict(self, state):
            self.place, self.walked = state["place"], state["walked"]

    class Inner(Level):
        def training_step(self, batch):
            return (self.module() - self.env.step(self.module())).square().sum() + (self.module() * self.outer()).sum()

    levels = [level("outer", uses=("inner",)), level("inner", Config(type="darts", unroll_steps=steps_per_unroll), ("outer",), cls=Inner)]
    return Engine(levels, EngineConfig(train_iters=1000, strategy="cpu"), BOTH, env=Walker())


@pytest.mark.parametrize("often", [True, False], ids=["a snapshot at each step", "most of it replayed"])
def test_an_environment_goes_back_too(often):
    torch.manual_seed(0)
    engine = acting()
    debugger = debugged(engine)
    if often:
        debugger.timeline.time_share = 1e9
    state = lambda: [*bits(engine), engine.env.place.clone(), torch.tensor(engine.env.walked)]  # noqa: E731
    found = {debugger.timeline.index: state()}
    while engine.completed < 12:
        engine.advance()
        found[debugger.timeline.index] = state()
    debugger.hypergradient("outer")  # looking makes it walk, and puts it back
    debugger.compare("outer", ["cg", "darts"], seconds=0)
    debugger.diagnose()
    debugger.constraining_sets("inner")
    assert same(state(), found[debugger.timeline.index])
    assert engine.env.walked > 12 and len({float(s[-2].sum()) for s in found.values()}) > 10
    for index in (7, 20, 3, 0, max(found)):
        debugger.goto(index)
        assert same(state(), found[index]), index
    debugger.back(5)
    debugger.replay()
    assert same(state(), found[max(found)])
    record = debugger.fork({"inner": "cg"}, {"inner": "darts"}, steps=4)
    assert same(state(), found[max(found)]) and len(record.branches) == 2


@pytest.mark.parametrize("method", ["cg", "unroll"])
@pytest.mark.parametrize("at", [(8, 21, 40), (9, 24, 43), (10, 23, 46)])
def test_roll_back_switched_on_and_off_while_it_runs(method, at):
    engine = noisy_program(method)
    debugger = debugged(engine)
    found = {0: bits(engine)}
    while debugger.timeline.index < 60:
        if debugger.timeline.index in at:  # in the middle of an unroll, too
            engine.config.roll_back = not engine.config.roll_back
        engine.advance()
        found[debugger.timeline.index] = bits(engine)
    assert any(a.kind == "roll_back" for a in debugger.timeline.log) and engine.config.roll_back
    for index in (max(found), 50, 42, 39, 22, 20, 9, 5, 41, max(found)):
        debugger.goto(index)
        assert same(bits(engine), found[index]), index
        assert engine.config.roll_back, "the options stay as they are now"
    debugger.goto(30)
    debugger.replay()
    assert same(bits(engine), found[max(found)])
    debugger.goto(min(at) - 2)  # from here on with roll back, which was not so then: another future
    debugger.step(20)
    assert any(a.kind == "roll_back" for a in debugger.timeline.log) and debugger.timeline.end == debugger.timeline.index
    debugger.goto(min(at) - 2)
    assert same(bits(engine), found[min(at) - 2])


def test_a_program_too_large_for_the_budget_runs_and_says_so():
    debugger = Debugger(noisy_program(), budget_mb=0.001)
    debugger.run(5).wait()
    assert not debugger.state.can_back and debugger.timeline.nbytes < 5000
    with pytest.raises(ValueError, match="its budget is 0 MB: set debugger.timeline.budget_mb"):
        debugger.goto(0)
    debugger.timeline.budget_mb = 10
    debugger.step(4)
    before = debugger.state.index
    debugger.back(2)
    assert debugger.state.index < before
    with pytest.raises(ValueError, match="budget_mb must be a number of megabytes greater than 0, got -1"):
        debugger.timeline.budget_mb = -1


# Stepping


def test_unroll_goes_to_the_end_of_an_unroll():
    debugger = Debugger(noisy_program())
    debugger.unroll("inner")
    assert (debugger.engine.inner.steps, debugger.next) == (4, "take the hypergradient of outer")
    debugger.step()
    debugger.unroll("inner")
    assert debugger.engine.inner.steps == 8
    debugger.step_level("inner")  # by hand: the schedule does not move
    debugger.unroll("inner")
    assert debugger.engine.inner.count == 12


# Breakpoints


def healthy():
    torch.manual_seed(0)
    return [noisy_program("cg"), noisy_program("unroll"), breast_cancer_program(), pair(inner=Config(type="cg")), ridge_program("cg")[0]]


def test_a_healthy_program_runs_through():
    for engine in healthy():
        debugger = Debugger(engine)
        debugger.break_on("nonfinite")
        debugger.break_on("loss jump")
        debugger.break_on("hypergradient norm", above=1e3)
        if engine.inner.method.name == "unroll":
            debugger.break_on("agreement", cosine=0.9)
        debugger.run(80).wait()
        assert debugger.state.stopped_by is None and engine.completed == 80, debugger.state.stopped_by


@pytest.mark.parametrize("kind, options", [
    ("nonfinite", {}), ("loss jump", {"factor": 5}), ("hypergradient norm", {"above": 1e4}), ("hypergradient norm", {"below": 1e-3}),
    ("agreement", {"error": 0.05}), ("function", {}),
])  # fmt: skip
def test_each_kind_stops_a_run_where_it_happens(kind, options):
    debugger = Debugger(noisy_program("darts" if kind == "agreement" else "cg"))
    debugger.run(30).wait()
    what = kind if kind != "function" else lambda d: d.engine.completed >= 40
    breakpoint = debugger.break_on(what, **options)
    inner, outer = debugger.engine.inner, debugger.engine.outer
    if kind == "nonfinite":
        with torch.no_grad():
            inner.module[0].weight[0, 0] = float("nan")
    elif kind == "loss jump":
        inner.module[-1].weight.data.mul_(1000)
    elif kind == "hypergradient norm":
        scale = 1e8 if "above" in options else 1e-8
        original = type(outer).training_step
        type(outer).training_step = lambda self, batch: scale * original(self, batch)
    at = debugger.state.index
    debugger.run(200).wait()
    hit = debugger.state.stopped_by
    assert hit is not None and hit.kind == kind and hit.number == breakpoint.number and hit.index == debugger.state.index > at
    assert hit.text in debugger.state.summary() and not debugger.running and debugger.error is None
    assert debugger.breakpoints().rows[0].hits == 1 and [m.kind for m in debugger.timeline_record().marks].count("breakpoint") == 1
    debugger.remove_breakpoint(breakpoint)
    debugger.run(3).wait()
    assert debugger.state.stopped_by is None


def test_breakpoints_stop_steps_too_and_leave_the_bits_alone():
    debugger = Debugger(noisy_program())
    debugger.break_on("hypergradient norm", "outer", above=0.0)
    debugger.step(20)
    assert debugger.stopped_by.level == "outer" and debugger.next.startswith("descend outer")
    debugger.until("inner")
    debugger.enable_breakpoint(1, False)
    debugger.break_on("agreement", cosine=-1.0)
    debugger.break_on("nonfinite")
    debugger.break_on("loss jump")
    debugger.engine.run(20 - debugger.engine.completed)
    assert same(bits(debugger.engine), straight("implicit", 20))


# The hypergradient


def test_the_vectors_along_each_path():
    class Mid(Level):
        uses = ("low", "top")

    torch.manual_seed(0)
    levels = [level("top", uses=("mid",)), level("mid", Config(type="exact"), ("low", "top"), cls=Mid), level("low", Config(type="exact"), ("top",))]
    engine = Engine(levels, EngineConfig(), {"u2l": {"top": ["low", "mid"]}, "l2u": {"low": ["mid"], "mid": ["top"]}})
    debugger = Debugger(engine)
    debugger.step(9)
    record = debugger.hypergradient("top")
    assert sorted(p.levels for p in record.paths) == [("top", "low", "mid", "top"), ("top", "mid", "top")]
    for path in record.paths:
        assert len(path.norms) == len(path.levels) - 1 and path.norms[0] == path.norm
    vectors = {s.level: s.vector for s in record.solves}
    by_path = {p.levels: p.norms for p in record.paths}
    assert by_path[("top", "mid", "top")][1] == pytest.approx(vectors["mid"]) == by_path[("top", "low", "mid", "top")][2]
    assert by_path[("top", "low", "mid", "top")][1] == pytest.approx(vectors["low"])
    assert sum(p.share for p in record.paths) == pytest.approx(1) and record.mb > 0 and "norms along it" in repr(record)


# Declared against actual


class Maml(IterativeProblem):
    def initial_parameters(self):
        return self.outer.parameters()

    def training_step(self, batch):
        return (self() - 1).square().sum()


class Copied(Maml):
    def initial_parameters(self):
        return None

    def on_inner_loop_start(self):
        self.module.load_state_dict(self.outer.module.state_dict())


class LearnedRate(IterativeProblem):
    def optimizer_options(self):
        return {"lr": self.outer().mean().exp()}

    def training_step(self, batch):
        return (self() - 1).square().sum()


class Sometimes(ImplicitProblem):
    "Uses `outer` at every eighth step only"

    def training_step(self, batch):
        loss = (self() - 1).square().sum()
        return loss + (self.outer() * self()).sum() if self.count % 8 == 7 else loss


class OnSomeBatches(ImplicitProblem):
    def training_step(self, batch):
        loss = (self() - 1).square().sum()
        return loss + (self.outer() * self()).sum() if batch else loss


def built(cls, loader=(0,)):
    lower = level("inner", Config(unroll_steps=8), cls=cls)
    lower.train_data_loader = list(loader)
    return Engine([level("outer", uses=("inner",)), lower], EngineConfig(), BOTH)


def test_sound_programs_have_no_findings():
    special = [built(Maml), built(Copied), built(LearnedRate), built(Sometimes), built(OnSomeBatches, [0, 0, 0, 1, 0])]
    for engine in [*healthy(), *special]:
        debugger = Debugger(engine)
        for steps in (0, 1, 12):  # before the first batch, after it, and later
            if steps:
                debugger.step(steps)
            if steps < 12 and engine.inner.__class__ is OnSomeBatches:
                continue  # the batch in question was not drawn yet
            for k in engine.graph.levels:
                before = bits(engine)
                record = debugger.constraining_sets(k)
                assert record.findings == (), (k, steps, record)
                assert same(bits(engine), before)


def test_the_program_of_the_quick_start_has_no_findings():
    debugger = Debugger(quick_start())
    debugger.step(3)
    for k in debugger.engine.graph.levels:
        record = debugger.constraining_sets(k)
        assert record.findings == () and all(row.touched and row.declared for row in record.rows) and record.rows, record


def quick_start():
    "The engine of the tutorial, from its cells"
    import json

    from tests.repo import ROOT

    cells = json.loads((ROOT / "nbs/tutorials/quick_start.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "engine" in names:
                return names["engine"]


class Detached(ImplicitProblem):
    def training_step(self, batch):
        return (self() - 1).square().sum() + (self.outer().detach() * self()).sum()


@pytest.mark.filterwarnings("ignore:.*gets no hypergradient")
@pytest.mark.parametrize("ill, at, sentence", [
    (lambda: built(Detached), "inner", "the u2l edge 'outer' -> 'inner' has no effect"),
    (lambda: pair(dependencies={"l2u": {"inner": ["outer"]}}), "inner", "add u2l={'outer': ['inner']}"),
    (lambda: Engine([level("outer"), level("inner", uses=("outer",))], None, BOTH), "outer", "the l2u edge 'inner' -> 'outer' has no effect"),
    (lambda: Engine([level("top", uses=("mid", "low")), level("mid", uses=("low", "top")), level("low")], None,
                    {"u2l": {"top": ["mid"]}, "l2u": {"low": ["mid"], "mid": ["top"]}}), "top", "add l2u={'low': ['top']}"),
    (lambda: Engine([level("a", uses=("b",)), level("b")]), "a", "add l2u={'b': ['a']} if 'b' is a lower level, u2l={'b': ['a']} if it is an upper one"),
], ids=["detached", "missing u2l", "useless l2u", "missing l2u", "unrelated"])  # fmt: skip
def test_a_missing_or_useless_edge_is_named(ill, at, sentence):
    debugger = Debugger(ill())
    debugger.step(3)
    found = {k: debugger.constraining_sets(k).findings for k in debugger.engine.graph.levels}
    assert len(found[at]) == 1 and sentence in found[at][0], found
    assert not [k for k, f in found.items() if f and k != at], found


def test_a_loss_that_cannot_be_evaluated_is_not_judged():
    class Broken(Level):
        def training_step(self, batch):
            raise KeyError("no such column")

    debugger = Debugger(Engine([level("outer"), level("inner", cls=Broken)], None, BOTH))
    record = debugger.constraining_sets("inner")
    assert record.findings == () and "no such column" in record.note and {r.touched for r in record.rows} == {None}


# Methods


def test_compare_can_be_paused_and_has_a_budget():
    debugger = Debugger(noisy_program())
    debugger.until("outer")
    before = bits(debugger.engine)
    threading.Timer(0.5, debugger.pause).start()
    start = time.perf_counter()
    comparison = debugger.compare("outer", seconds=0.2)
    print(f"paused after {time.perf_counter() - start:.1f} s with {len(comparison.rows)} rows")
    assert comparison.left_out and comparison.rows[0].current and same(bits(debugger.engine), before)
    short = debugger.compare("outer", ["darts", "exact", "cg", "neumann"], seconds=0.2, budget=0.25)
    assert short.left_out and len(short.rows) + len(short.left_out) >= 4 and "Left out: " in short.summary()
    debugger.step()


def test_use_this_one():
    debugger = Debugger(noisy_program())
    debugger.until("outer")
    row = next(r for r in debugger.compare("outer", ["darts", "neumann"], seconds=0).rows if r.method == "neumann")
    assert row.mb > 0
    debugger.use(row)
    assert str(debugger.engine.inner.method) == row.label
    debugger.swap("inner", "exact")
    debugger.use(row)
    assert str(debugger.engine.inner.method) == row.label
    with pytest.raises(TypeError, match="use.row. takes a row of what compare.. returned"):
        debugger.use("neumann")


# TensorBoard


def test_tensorboard_shows_the_present_run(tmp_path):
    engine = breast_cancer_program(engine_config=EngineConfig(train_iters=60, logger_type="tensorboard", log_dir=str(tmp_path), strategy="cpu"))
    board = Debugger(engine).tensorboard()
    engine.run()
    try:
        tags, end = "", time.time() + 30
        while "outer/loss" not in tags and time.time() < end:
            tags = urllib.request.urlopen(f"{board.url}data/plugin/scalars/tags", timeout=10).read().decode()
            time.sleep(0.3)
        assert "inner/loss" in tags and "outer/loss" in tags
    finally:
        board.close()
