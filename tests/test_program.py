"""The program as a whole: one stream of actions, going back, undisturbed looking, and a sentence for every mistake."""

import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from betty_nb import CG, Config, Engine, EngineConfig, Graph, GraphError, GraphWarning, ImplicitProblem
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import METHODS
from tests.programs import BOTH, Level, Vector, bits, level, noisy_program, pair, same

# Running, stepping and going back are the same program


@pytest.mark.parametrize("method", ["darts", "cg"])
def test_a_run_and_single_steps_give_the_same_bits(method):
    ran = noisy_program(method)
    ran.run(50)
    end = bits(ran)
    stepped = Debugger(noisy_program(method))
    while stepped.engine.completed < 50:
        stepped.step()
    assert same(bits(stepped.engine), end)
    in_background = Debugger(noisy_program(method))
    in_background.run(50).wait()
    assert same(bits(in_background.engine), end)


@pytest.mark.parametrize("back", [1, 2, 7, 33, 60])
def test_back_then_replay_gives_the_same_bits(back):
    debugger = Debugger(noisy_program())
    trail = [bits(debugger.engine)]
    for _ in range(60):
        debugger.step()
        trail.append(bits(debugger.engine))
    debugger.back(back)
    assert same(bits(debugger.engine), trail[60 - back])
    for i in range(60 - back, 60):
        assert same(bits(debugger.engine), trail[i])
        debugger.step()
    assert same(bits(debugger.engine), trail[60])
    debugger.step(20)  # beyond the tape: the shuffled loaders go on as if nothing had happened
    undisturbed = Debugger(noisy_program())
    undisturbed.step(80)
    assert same(bits(debugger.engine), bits(undisturbed.engine))


def test_back_through_steps_made_by_hand_and_a_swap():
    debugger = Debugger(noisy_program("darts"))
    debugger.step(6)
    debugger.step_level("inner", 3)
    debugger.swap("inner", "cg", iterations=2)
    middle = bits(debugger.engine)
    debugger.step_level("outer")
    debugger.step(9)
    end = bits(debugger.engine)
    debugger.back(10)
    assert same(bits(debugger.engine), middle)
    debugger.step_level("outer")
    debugger.step(9)
    assert same(bits(debugger.engine), end)
    debugger.back(19)  # into the time before the swap: replayed with the method of that time
    debugger.swap("inner", "darts")
    assert debugger.state.index == 0 and same(bits(debugger.engine), bits(noisy_program("darts")))


def test_loaders_that_use_numpy_and_python_generators_replay_too():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.tensor([float(i), random.random(), np.random.rand()])

    def program():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        a, b = Vector(3, 1.0), Vector(3, 0.0)

        class Inner(ImplicitProblem):
            def training_step(self, batch):
                return (self.module() - batch.mean(0)).square().sum() + (self.outer() * self.module()).sum()

        class Outer(ImplicitProblem):
            def training_step(self, batch):
                return (self.inner() - 1).square().sum()

        loader = torch.utils.data.DataLoader(Augmented(), batch_size=4, shuffle=True)
        o = Outer("outer", None, a, torch.optim.SGD(a.parameters(), lr=0.1), train_data_loader=[0])
        i = Inner("inner", Config(type="cg", unroll_steps=2), b, torch.optim.SGD(b.parameters(), lr=0.1), train_data_loader=loader)
        return Debugger(Engine([o, i], dependencies=BOTH))

    debugger = program()
    debugger.step(40)
    debugger.back(20)
    debugger.step(40)
    straight = program()
    straight.step(60)
    assert same(bits(debugger.engine), bits(straight.engine))


# Looking changes nothing


@pytest.mark.parametrize("method", list(METHODS))
def test_looking_never_disturbs(method):
    debugger = Debugger(noisy_program(method))
    debugger.until("outer")
    before, python, numpy = bits(debugger.engine), random.getstate(), np.random.get_state()
    debugger.hypergradient("outer")
    debugger.compare("outer", [method, "darts"] if debugger.engine.inner.kind == "implicit" else None, seconds=0)
    debugger.constraining_sets("inner"), debugger.methods("inner"), repr(debugger), debugger.history("inner")
    assert same(bits(debugger.engine), before)
    assert random.getstate() == python and all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy))


def test_looking_at_every_step_leaves_the_run_as_it_is():
    plain = noisy_program()
    plain.run(12)
    looked = Debugger(noisy_program())
    while looked.engine.completed < 12:
        looked.hypergradient("outer", reference=looked.engine.completed < 3)
        looked.step()
    assert same(bits(looked.engine), bits(plain))


def test_a_training_step_that_raises_inside_a_hypergradient_leaves_everything_in_place():
    engine = noisy_program("darts")
    debugger = Debugger(engine)
    debugger.until("outer")
    before, calls = bits(engine), []
    original = type(engine.inner).training_step

    def failing(self, batch):
        calls.append(1)
        if len(calls) == 2:  # the second of the two displaced passes
            raise ZeroDivisionError("in the middle")
        return original(self, batch)

    type(engine.inner).training_step = failing
    try:
        with pytest.raises(ZeroDivisionError):
            debugger.hypergradient("outer", reference=False)
    finally:
        type(engine.inner).training_step = original
    assert len(calls) == 2 and same(bits(engine), before)


# The hypergradient


def test_several_upper_levels_step_one_after_the_other():
    levels = [level("a", uses=("low",)), level("b", uses=("low", "a")), level("low", Config(type="exact", unroll_steps=2), ("a", "b"))]
    engine = Engine(levels, EngineConfig(train_iters=10), {"u2l": {"a": ["low"], "b": ["low"]}, "l2u": {"low": ["a", "b"]}})
    said = []
    while engine.completed < 2:
        said.append(str(engine.advance()))
    assert [s for s in said if "draw" not in s] == [
        "descend low", "descend low", "take the hypergradient of a", "descend a", "take the hypergradient of b", "descend b",
    ]  # fmt: skip


def test_frozen_and_left_out_parameters_are_left_alone():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1, bias=False))
    net[0].weight.requires_grad_(False)
    decay = Vector(1, -2.0)

    class Inner(ImplicitProblem):
        def training_step(self):
            return self.module(torch.ones(5, 3)).sub(1).square().mean() + self.outer().exp() * net[2].weight.square().sum()

    class Outer(ImplicitProblem):
        def training_step(self):
            return self.inner(torch.ones(5, 3)).square().mean()

    kept = [net[0].weight.clone(), net[1].weight.clone()]
    inner = Inner("inner", Config(type="exact"), net, torch.optim.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.05))
    outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1))
    engine = Engine([inner, outer], dependencies=BOTH)
    engine.run(20)
    assert torch.equal(net[0].weight, kept[0]) and torch.equal(net[1].weight, kept[1])
    assert decay().item() != -2.0 and [n for n, _ in inner.named_trainable_parameters()] == ["0.bias", "2.weight"]


# A sentence for every mistake


def test_a_cycle():
    with pytest.raises(GraphError, match="l2u edges form a cycle, .*: remove one of the edges"):
        pair(dependencies={"l2u": {"inner": ["outer"], "outer": ["inner"]}})


def test_a_forgotten_u2l_edge():
    with pytest.warns(GraphWarning, match=r"'outer' gets no hypergradient, only its direct gradient: add u2l=\{'outer': \['inner'\]\}"):
        pair(dependencies={"l2u": {"inner": ["outer"]}})


def test_a_u2l_edge_without_a_way_back():
    with pytest.raises(GraphError, match="has no l2u way back"):
        pair(dependencies={"u2l": {"outer": ["inner"]}})


def test_an_unknown_level_in_the_dependencies():
    with pytest.raises(GraphError, match="'iner', which is not among the problems: did you mean 'inner'"):
        pair(dependencies={"u2l": {"outer": ["iner"]}, "l2u": {"inner": ["outer"]}})


def test_an_unknown_method_is_answered_with_the_closest_names():
    with pytest.raises(ValueError, match="no hypergradient method 'drats': did you mean 'darts'"):
        Config(type="drats")


def test_a_method_on_a_level_where_it_has_no_effect():
    with pytest.warns(GraphWarning, match="on level 'outer' has no effect, .*: set it on 'inner'"):
        pair(outer=Config(type="cg"))


def test_defect_12_what_was_silent_is_said():
    with pytest.warns(GraphWarning, match="gets no hypergradient"):
        pair(dependencies={"l2u": {"inner": ["outer"]}})
    with pytest.raises(GraphError, match="cycle"):
        pair(dependencies={"l2u": {"inner": ["outer"], "outer": ["inner"]}})
    with pytest.warns(GraphWarning, match="has no effect"):
        pair(outer=Config(type="cg"))
    with pytest.raises(ValueError, match="did you mean 'cg'"):
        pair(outer=Config(type="cgg"))
    with pytest.raises(ValueError, match="'inner'.* unroll differentiates the steps of an unroll"):
        pair(inner=Config(type="unroll"))


def test_a_sound_program_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair(inner=Config(type="cg")).run()


def test_a_missing_loader():
    with pytest.raises(ValueError, match="Level 'outer' has no train_data_loader, though its training_step takes a batch: pass one"):
        pair(loader=False)


def test_one_loader_for_two_levels():
    "Of a loader with persistent workers torch keeps one pass, which each level would begin anew"

    def shared(**options):
        loader, levels = torch.utils.data.DataLoader(range(8), batch_size=2, **options), [level("outer", uses=("inner",)), level("inner", uses=("outer",))]
        for problem in levels:
            problem.train_data_loader = loader
        return Engine(levels, EngineConfig(train_iters=50, strategy="cpu"), BOTH)

    with pytest.raises(ValueError, match="Levels 'outer' and 'inner' share a DataLoader with persistent_workers=True.*give each a DataLoader of its own"):
        shared(num_workers=1, persistent_workers=True)
    engine = shared()
    engine.run(6)
    assert engine.inner.drawn == engine.outer.drawn == 6 and engine.inner.sources()[0].epoch == 1


def test_a_missing_optimizer():
    with pytest.raises(ValueError, match="Level 'outer' has no optimizer: pass one"):
        Engine([Level("outer", module=Vector(), train_data_loader=[0])])


def test_unroll_steps_zero():
    with pytest.raises(ValueError, match="unroll_steps=.* must be at least 1, got 0"):
        Config(unroll_steps=0)


class Shaped(ImplicitProblem):
    def training_step(self, batch):
        return self.module() * 2


def test_a_loss_that_is_not_a_scalar():
    engine = Engine([level("outer", cls=Shaped)])
    with pytest.raises(ValueError, match=r"The loss of 'outer' must be one number, got a tensor of shape \(3,\): reduce it"):
        engine.run(1)


class Exploding(ImplicitProblem):
    def training_step(self, batch):
        return (self.module() - 1).square().sum() / (self.steps < 5)


def test_a_loss_that_is_not_finite_is_warned_about_or_raised():
    with pytest.warns(RuntimeWarning, match="The loss of 'outer' is (nan|inf) after 10 of its steps: lower its learning rate"):
        Engine([level("outer", cls=Exploding)], EngineConfig(train_iters=10)).run()
    with pytest.raises(FloatingPointError, match="The loss of 'outer' is inf at its step 6"):
        Engine([level("outer", cls=Exploding)], EngineConfig(train_iters=10, nonfinite="raise")).run()


def test_names_that_would_hide_something():
    for name in ("module", "step", "run"):
        with pytest.raises(GraphError, match=f"can't be called '{name}'"):
            Engine([level("outer"), level(name)])


def test_a_cell_that_builds_the_engine_can_be_run_again():
    levels = [level("outer", uses=("inner",)), level("inner", uses=("outer",))]
    for _ in range(2):
        engine = Engine(levels, EngineConfig(train_iters=5), BOTH)
        engine.run()
        assert engine.inner.steps == 5


def test_dependencies_of_a_live_program_can_be_replaced():
    engine = pair()
    engine.run(5)
    engine.set_dependency({})
    engine.run(5)
    assert engine.graph == Graph(("outer", "inner")) and engine.inner.steps == 10 and engine.outer.children == []


# The debugger under pressure


@pytest.mark.alone
def test_pause_takes_effect_within_200_ms():
    debugger = Debugger(noisy_program())
    waits = []
    for _ in range(10):
        debugger.run(100_000)
        time.sleep(0.05)
        start = time.perf_counter()
        debugger.pause()
        waits.append(time.perf_counter() - start)
        assert not debugger.running
    print(f"pause: median {1e3 * sorted(waits)[5]:.1f} ms, longest {1e3 * max(waits):.1f} ms")
    assert max(waits) < 0.2


def test_two_callers_never_act_at_once():
    debugger, refused = Debugger(noisy_program()), []
    inside, overlaps = [], []

    class Watch:
        def before(self, action):
            overlaps.extend(inside)
            inside.append(action)

        def after(self, action):
            inside.clear()

    debugger.engine.watchers.append(Watch())

    def hammer():
        for _ in range(20):
            for act in (debugger.step, lambda: debugger.run(3).wait(), lambda: debugger.hypergradient("outer"), lambda: debugger.back(1)):
                try:
                    act()
                except RuntimeError as error:
                    refused.append(str(error))

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a debugger that hangs"
    assert not overlaps and not debugger.running
    assert all("pause() it first" in sentence for sentence in refused), set(refused)
    debugger.step()


def test_the_memory_budget_holds():
    debugger = Debugger(noisy_program(), budget_mb=1)
    debugger.run(400).wait()
    debugger.step(50)
    assert debugger.timeline.nbytes <= 2**20
    at = debugger.state.index
    now = bits(debugger.engine)
    debugger.step(5)
    debugger.goto(at)
    assert same(bits(debugger.engine), now)


def test_a_closed_debugger_lets_go():
    engine = noisy_program()
    Debugger(engine).close()
    assert engine.watchers == [] and engine.inner.reader == engine.inner.fetch
    assert Debugger(engine) is Debugger(engine)


def test_swap_and_compare_on_the_live_program():
    debugger = Debugger(noisy_program("darts"))
    debugger.until("outer")
    assert debugger.compare("outer", seconds=0).rows[0].method == "darts"
    debugger.swap("inner", CG(iterations=30, damping=0.1))
    assert debugger.engine.inner.method == CG(iterations=30, damping=0.1)
    assert next(m for m in debugger.methods("inner") if m.current).label == "cg(iterations=30, damping=0.1)"
