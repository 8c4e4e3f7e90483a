"Saving and resuming a whole program: killed at any moment, from any file, with any data."

import dataclasses
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from tests import killed
from tests.programs import BOTH, Level, Vector, bits, level, noisy_program, pair, same

ITERATIONS = 40
KILLS = 4  # of each kind


@pytest.fixture(scope="module")
def processes():
    "Processes that begin with torch already imported"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed"])
    os.environ.setdefault("PYTHONHASHSEED", "0")  # so that fingerprints of two processes can be compared
    return context


def start(processes, *args):
    child = processes.Process(target=killed.work, args=args, daemon=True)
    child.start()
    return child


def lines(folder):
    try:
        return (folder / "losses").read_text().splitlines()
    except FileNotFoundError:
        return []


def wait_for(condition, child, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and child.is_alive() and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.parametrize("kind", killed.KINDS)
def test_killed_and_resumed(kind, processes, tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir(), whole.mkdir()
    reference = start(processes, kind, str(whole), ITERATIONS, 0, False)
    chance, deaths, during_save = random.Random(kind), 0, 0
    while deaths < KILLS:
        slow = deaths % 2 == 1
        child = start(processes, kind, str(folder), ITERATIONS, deaths, True, slow, False)
        if slow:  # in the middle of a save
            wait_for((folder / "saving").exists, child)
        else:
            goal = len(lines(folder)) + chance.randrange(1, 8)
            wait_for(lambda goal=goal: len(lines(folder)) >= goal, child)
            time.sleep(chance.random() * 0.03)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"the process ended by itself ({child.exitcode})"
        deaths += 1
        if slow:
            (folder / "saving").unlink()
            during_save += any(f.suffix == ".tmp" for f in folder.iterdir())
    child = start(processes, kind, str(folder), ITERATIONS, 99)
    child.join(), reference.join()
    assert child.exitcode == reference.exitcode == 0
    assert during_save, "no kill fell into the writing of a file"
    expected = lines(whole)
    assert set(lines(folder)) == set(expected), "a loss differs from that of the uninterrupted run"
    assert len(lines(folder)) > len(expected), "nothing was repeated, so nothing was resumed"
    assert (folder / "done").read_text() == (whole / "done").read_text()
    assert {f.name for f in folder.iterdir()} == {"run.pt", "losses", "done"}, "killed saves left something behind"


# --- any moment


def losses(engine, actions):
    "The losses of the next `actions` actions, and the state afterwards"
    found = []
    for _ in range(actions):
        action = engine.advance()
        if action.kind == "descend":
            found.append(engine.level(action.level).last_loss.item())
    return found, bits(engine)


@pytest.mark.parametrize("kind", killed.KINDS)
def test_every_moment_of_an_unroll(kind, tmp_path):
    path, actions = tmp_path / "run.pt", 70
    expected, last = losses(killed.build(kind), actions)
    engine, done = killed.build(kind), 0
    for step in range(0, actions, 5):
        engine.save(path)
        engine = killed.build(kind)
        engine.run(step % 4)  # an engine that has gone somewhere else
        engine.load(path)
        now = losses(engine, min(5, actions - step))[0]
        assert now == expected[done : done + len(now)], f"after {step} actions"
        done += len(now)
    assert same(bits(engine), last)


def test_a_hypergradient_in_the_middle_of_an_unroll(tmp_path):
    engine = noisy_program("unroll")
    while engine.next_action.kind != "hypergradient":
        engine.advance()
    engine.save(tmp_path / "run.pt")
    again = noisy_program("unroll")
    again.load(tmp_path / "run.pt")
    assert len(again.inner.path) == len(engine.inner.path) == 4
    for a, b in zip(engine.probe("outer").total, again.probe("outer").total):
        assert torch.equal(a, b) and a.any()


def test_save_in_a_hook_waits_for_the_end_of_the_action(tmp_path):
    path = tmp_path / "run.pt"

    class Validated(Engine):
        def validation(self):
            self.save(path)
            assert not path.exists()
            return {"loss": torch.rand(()).item()}

    def build():
        torch.manual_seed(0)
        levels = [level("outer", None, ("inner",)), level("inner", None, ("outer",))]
        return Validated(levels, EngineConfig(valid_step=5, strategy="cpu"), BOTH)

    engine = build()
    engine.run(5)
    assert path.exists()
    again = build()
    again.load(path)
    assert again.completed == 5 and again.validated == engine.validated and all(m.training for p in again.problems for m in p.module.modules())
    assert same(bits(engine), bits(again))


def test_load_is_refused_in_a_hook_and_in_a_run(tmp_path):
    engine = pair()
    engine.save(tmp_path / "run.pt")
    engine.inner.param_callback = lambda: engine.load(tmp_path / "run.pt")
    with pytest.raises(RuntimeError, match="in the middle of an action"):
        engine.run(1)
    engine.claim()
    with pytest.raises(RuntimeError, match="is running already"):
        engine.load(tmp_path / "run.pt")
    engine.release()


# --- any data


class Stream(IterableDataset):
    def __iter__(self):
        order = torch.randperm(40).tolist()
        return iter([torch.tensor([float(i)]) for i in order])


class Counter:
    "An iterator that says where it stands"

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return torch.tensor([float(self.at)])

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def endless():
    k = 0
    while True:
        k += 1
        yield torch.tensor([float(k)]) + torch.rand(1)


def shuffled_by_python(n=12):
    class Shuffled:
        def __iter__(self):
            order = list(range(n))
            random.shuffle(order)
            return iter([torch.tensor([float(i)]) for i in order])

    return Shuffled()


def stateful(**options):
    loader = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed").StatefulDataLoader
    return loader(VALUES, batch_size=3, shuffle=True, **options)


VALUES = torch.arange(20.0).reshape(20, 1)
LOADERS = {
    "list": lambda: [torch.tensor([float(i)]) for i in range(7)],
    "shuffled": lambda: DataLoader(VALUES, batch_size=3, shuffle=True),
    "own generator": lambda: DataLoader(VALUES, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda: DataLoader(VALUES, batch_size=3, sampler=WeightedRandomSampler(torch.arange(20.0), 11)),
    "jittered": lambda: DataLoader(killed.Jittered(20), batch_size=3, shuffle=True, collate_fn=lambda rows: torch.stack([x for x, _ in rows])[:, :1]),
    "stream": lambda: DataLoader(Stream(), batch_size=7),
    "python": shuffled_by_python,
    "workers": lambda: DataLoader(killed.Jittered(20), batch_size=3, shuffle=True, num_workers=2, collate_fn=first_column),
    "persistent workers": lambda: DataLoader(VALUES, batch_size=3, shuffle=True, num_workers=1, persistent_workers=True),
    "generator": endless,
    "iterator of a loader": lambda: iter(DataLoader(VALUES.repeat(20, 1), batch_size=3, shuffle=True)),
    "with a state": Counter,
    "torchdata": stateful,
    "torchdata, workers": lambda: stateful(num_workers=1),
    "two": lambda: [DataLoader(VALUES, batch_size=3, shuffle=True), DataLoader(VALUES, batch_size=8, shuffle=True)],
}


def first_column(rows):
    return torch.stack([x for x, _ in rows])[:, :1]


class Follows(Level):
    def training_step(self, batch):
        batch = batch[0][:2] + batch[1][:2] if isinstance(batch, tuple) else batch
        return (self.module() - batch.mean()).square().sum() + torch.rand(()) * self.module().sum()


def one_level(loader):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    module = Vector(1)
    return Engine(
        [Follows("inner", None, module, torch.optim.SGD(module.parameters(), lr=0.1), train_data_loader=loader())], EngineConfig(strategy="cpu")
    )


@pytest.mark.parametrize("name", LOADERS)
def test_data_goes_on_where_it_stood(name, tmp_path):
    workers, path = "workers" in name, tmp_path / "run.pt"
    reference, draws = one_level(LOADERS[name]), 17 if workers else 26
    expected = losses(reference, 2 * draws)[0]
    for stop in (0, 7, 16) if workers else (0, 1, 6, 7, 8, 13, 14, 15, 20):
        engine = one_level(LOADERS[name])
        before = losses(engine, stop)[0]
        engine.save(path)
        again = one_level(LOADERS[name])
        again.load(path)
        assert before + losses(again, 2 * draws - stop)[0] == expected, f"saved after {stop} actions"


def test_data_that_can_not_go_back_is_refused(tmp_path):
    engine = one_level(endless)
    engine.save(tmp_path / "run.pt")
    engine.run(3)
    before = bits(engine)
    with pytest.raises(ValueError, match="given 3 batches already, more than the 0 of the checkpoint.*data=False"):
        engine.load(tmp_path / "run.pt")
    assert same(bits(engine), before)
    engine.load(tmp_path / "run.pt", data=False)
    assert engine.completed == 0


def test_other_data_is_refused(tmp_path):
    one_level(LOADERS["list"]).save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="was a list of batches and is now a loader that can be iterated over again"):
        one_level(LOADERS["shuffled"]).load(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="gave 7 batches a pass and gives 2 now"):
        one_level(lambda: [torch.zeros(1), torch.ones(1)]).load(tmp_path / "run.pt")


def test_own_attributes_by_extra_state(tmp_path):
    class Own(Follows):
        at = 0

        def get_batch(self):
            self.at += 1
            return torch.tensor([float(self.at)])

        def extra_state(self):
            return {"at": self.at}

        def load_extra_state(self, state):
            self.at = state["at"]

    def build():
        module = Vector(1)
        return Engine([Own("inner", None, module, torch.optim.SGD(module.parameters(), lr=0.1))], EngineConfig(strategy="cpu"))

    engine, again = build(), build()
    engine.run(5)
    engine.save(tmp_path / "run.pt")
    expected = losses(engine, 6)[0]
    again.load(tmp_path / "run.pt")
    assert again.inner.at == 5 and losses(again, 6)[0] == expected


# --- any batch

Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    weight: np.ndarray


class Encoding(UserDict):
    def to(self, device):
        return self


BATCHES = {
    "named tuple": Point(torch.ones(2), ["text", 3]),
    "dataclass": Sample(torch.ones(2), np.arange(3.0)),
    "like BatchEncoding": Encoding(x=torch.ones(2), length=np.int64(2)),
    "view": torch.arange(100_000.0)[3:5],
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_class(name, tmp_path):
    path, batch = tmp_path / "run.pt", BATCHES[name]

    def build():
        return one_level(lambda: iter(lambda: batch, None))

    engine = build()
    engine.advance()
    engine.save(path)
    assert path.stat().st_size < 40_000
    again = build()
    if name == "view":
        again.load(path)
        assert torch.equal(again.inner.batch, batch)
        return
    with pytest.raises(ValueError, match=f"{type(batch).__name__}, which no batch of this program has.*add_safe_globals"):
        again.load(path)
    with torch.serialization.safe_globals([type(batch)]):
        again.load(path)
    assert type(again.inner.batch) is type(batch) and repr(again.inner.batch) == repr(batch)
    known = one_level(lambda: DataLoader([batch], batch_size=None))  # a class that the program's own data has needs no word
    known.advance()
    known.save(path)
    fresh = one_level(lambda: DataLoader([batch], batch_size=None))
    fresh.load(path)
    assert type(fresh.inner.batch) is type(batch)


def test_what_can_not_be_held_is_said(tmp_path):
    engine = one_level(lambda: [torch.ones(1)])
    engine.advance()
    engine.inner.batch = [lambda: 0]
    with pytest.raises(TypeError, match="'batch' of level 'inner' has a builtins.function in it"):
        engine.save(tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


# --- any optimizer and scheduler

S = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda o: S.StepLR(o, 5, 0.5),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.5, 60),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [3, 9]),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.1, 4), S.ExponentialLR(o, 0.9)], [6]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, 4), S.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 7),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name, tmp_path):
    def build():
        torch.manual_seed(2)
        module = Vector(2)
        adam = torch.optim.AdamW([{"params": [module.value]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3}], amsgrad=True)
        return Engine([Level("inner", None, module, adam, SCHEDULERS[name](adam), [0])], EngineConfig(strategy="cpu"))

    engine = build()
    engine.run(7)
    engine.save(tmp_path / "run.pt")
    again = build()
    again.load(tmp_path / "run.pt")
    engine.run(10), again.run(10)
    assert same(bits(engine), bits(again))


def test_learned_options_and_parameters_outside_the_module(tmp_path):
    class Fit(IterativeProblem):
        def training_step(self):
            return (self.module() - 1).square().sum()

        def optimizer_options(self):
            return {"lr": self.outer().exp().squeeze()}

    class Tune(ImplicitProblem):
        def training_step(self):
            return self.inner.module().square().sum() + self.free.square().sum()

    def build():
        modules, free = [Vector(2), Vector(1, -2.0)], torch.nn.Parameter(torch.tensor([3.0]))
        inner = Fit("inner", Config(unroll_steps=3), modules[0], torch.optim.SGD(modules[0].parameters(), lr=0.1, momentum=0.9))
        outer = Tune("outer", None, modules[1], torch.optim.SGD([*modules[1].parameters(), free], lr=0.1))
        outer.free = free
        return Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH)

    engine = build()
    engine.run(8)
    engine.save(tmp_path / "run.pt")
    again = build()
    again.load(tmp_path / "run.pt")
    engine.run(9), again.run(9)
    assert same(bits(engine), bits(again)) and torch.equal(engine.outer.free, again.outer.free) and engine.outer.free != 3


# --- any file


def refused(path, match, engine):
    before = bits(engine)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        engine.load(path)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") < 2
    assert same(bits(engine), before)


class Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/broken-into",)


def test_other_files(tmp_path):
    path, engine = tmp_path / "run.pt", noisy_program()
    refused(path, "no such file", engine)
    refused(tmp_path, "that is a folder", engine)
    path.write_bytes(b"")
    refused(path, "the file is empty", engine)
    path.write_text("loss 0.1\n" * 100)
    refused(path, "it is not one that engine.save wrote", engine)
    torch.save(engine.inner.state_dict(), path)
    refused(path, "it is not one that engine.save wrote", engine)
    torch.save({"format": "betty_nb checkpoint", "version": 99}, path)
    refused(path, "a newer version wrote it", engine)
    torch.save({"format": "betty_nb checkpoint", "version": 1}, path)
    refused(path, "it is damaged", engine)
    for write in (lambda: torch.save({"format": "betty_nb checkpoint", "levels": Attack(tmp_path)}, path), lambda: path.write_bytes(pickle.dumps(Attack(tmp_path)))):
        write()
        refused(path, "that only running code|not one that engine.save wrote", engine)
    assert not (tmp_path / "broken-into").exists()


def test_damage_is_noticed_wherever_it_is(tmp_path):
    path, engine = tmp_path / "run.pt", noisy_program("unroll")
    engine.run(6)
    engine.save(path)
    saved, whole, chance = bits(engine), path.read_bytes(), random.Random(0)
    engine.run(1)
    refusals = 0
    for k in range(60):
        data = bytearray(whole)
        if k % 3 == 0:
            data = data[: chance.randrange(1, len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        before = bits(engine)
        try:
            engine.load(path)
        except ValueError:
            refusals += 1
            assert same(bits(engine), before)
        else:  # a bit that means nothing, such as one of the padding between two tensors
            assert same(bits(engine), saved)
            engine.run(1)
    assert refusals > 30


def test_other_programs(tmp_path):
    path = tmp_path / "run.pt"
    noisy_program().save(path)
    refused(path, "'inner' was missing|'0.weight' of level 'inner' was", small := _with_module(torch.nn.Linear(4, 1)))
    small.save(path)
    refused(path, "levels 'outer', 'inner', and this one has 'inner'", one_level(lambda: [torch.ones(1)]))
    pair().save(path)
    refused(path, "u2l edges outer -> inner, and this one has none", pair(dependencies={}))
    changed = pair()
    changed.inner.optimizer = torch.optim.Adam(changed.inner.module.parameters())
    refused(path, "the optimizer of level 'inner' was SGD and is Adam now", changed)
    changed = pair()
    changed.inner.scheduler = S.StepLR(changed.inner.optimizer, 3)
    refused(path, "the scheduler of level 'inner' was none and is StepLR now", changed)


def _with_module(module):
    engine = noisy_program()
    engine.inner.module = module
    return engine


# --- failures on the way


@pytest.mark.parametrize("where", ["scheduler", "extra", "module", "data", "interrupt"])
def test_a_failure_in_the_middle_changes_nothing(where, tmp_path):
    path, engine = tmp_path / "run.pt", noisy_program("unroll")
    engine.run(9)
    engine.save(path)
    other = noisy_program("unroll")
    other.run(4)
    before = bits(other)

    def fail(*_):
        raise KeyboardInterrupt if where == "interrupt" else RuntimeError("out of luck")

    if where == "scheduler" or where == "interrupt":
        other.inner.scheduler.load_state_dict = fail
    elif where == "extra":
        other.outer.extra_state, other.outer.load_extra_state = lambda: None, fail
        engine.outer.extra_state = lambda: {"a": 1}
        engine.save(path)
    elif where == "data":
        other.inner.train_data_loader.batch_sampler.sampler.__class__ = type("Broken", (type(other.inner.train_data_loader.sampler),), {"__iter__": fail})
    else:
        other.load_training_state = fail
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else ValueError, match=None if where == "interrupt" else "out of luck. The program is as it was."):
        other.load(path)
    assert same(bits(other), before)
    if where == "data":
        del other.inner.train_data_loader.batch_sampler.sampler.__class__.__iter__
    now = losses(other, 30)
    reference = noisy_program("unroll")
    reference.run(4)
    expected = losses(reference, 30)
    assert now[0] == expected[0] and same(now[1], expected[1])


def _save_with_a_full_disk(path):
    engine = noisy_program()
    engine.run(3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        engine.save(path)
    except OSError as error:
        os._exit(7 if "what stood there before still stands" in str(error) else 1)
    os._exit(2)


def test_a_save_that_fails_leaves_the_old_file(processes, tmp_path):
    path = tmp_path / "run.pt"
    noisy_program().save(path)
    before = path.read_bytes()
    child = processes.Process(target=_save_with_a_full_disk, args=(path,))
    child.start(), child.join()
    assert child.exitcode == 7 and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".run.pt.0123abcd.tmp").write_text("left by a killed save")
    noisy_program().save(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="lies in a folder that does not exist"):
        noisy_program().save(tmp_path / "none" / "run.pt")


# --- and with a debugger


def test_with_a_debugger_that_has_gone_back(tmp_path):
    debugger_of = pytest.importorskip("betty_nb.debugger").Debugger
    engine = noisy_program()
    debugger = debugger_of(engine)
    engine.run(6)
    debugger.step(3)
    debugger.back(5)  # some batches were drawn and come again
    engine.save(tmp_path / "run.pt")
    here, after = bits(engine), losses(engine, 20)
    other = noisy_program()
    watched = debugger_of(other)
    other.run(3)
    other.load(tmp_path / "run.pt")
    assert same(bits(other), here) and not watched.state.can_back
    assert losses(other, 20)[0] == after[0] and same(bits(other), after[1])
    watched.back(4)
    watched.step(4)
    plain = noisy_program()
    plain.load(tmp_path / "run.pt")
    assert losses(plain, 20)[0] == after[0]
