"Several processes train as one: n of them with batches of b give what one gives with batches of n b."

import os
import socket
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from betty_nb.hypergradient import METHODS, make_method
from tests.distributed_program import Iterative, program
from tests.repo import ROOT

METHOD_NAMES = [name for name, method in METHODS.items() if method.serves == "implicit"]
SAMPLING = ("evolution", "reinforce")


def chosen(name):
    "The method with options for which two processes can be compared with one to rounding"
    few = {"cg": {"iterations": 20}, "normal_cg": {"iterations": 5}, "neumann": {"iterations": 5, "alpha": 0.1}}  # before rounding counts
    return make_method(name, **few.get(name, {}))


def child(rank, count, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    found = {}
    for name in names:
        engine = program(chosen(name), "distributed", 16, iterations=9)
        try:
            engine.run()
        except ValueError as error:
            found[name] = str(error)
            continue
        found[name] = [p.module().detach().clone() for p in (engine.inner, engine.outer)]
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def in_two_processes(target, *arguments):
    "What `target(rank, 2, folder, *arguments)` saved in each of two processes"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(target, (2, folder, *arguments), nprocs=2, start_method="fork")
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(2)]


def test_two_processes_give_what_one_gives_with_twice_the_batch():
    found = in_two_processes(child, METHOD_NAMES)
    for name in METHOD_NAMES:
        assert not isinstance(found[0][name], str) or name in SAMPLING, f"{name}: {found[0][name]}"
        for a, b in zip(found[0][name], found[1][name]):
            assert isinstance(a, str) or torch.equal(a, b), f"{name}: the processes have come apart"
        if name in SAMPLING:
            continue
        alone = program(chosen(name), "cpu", 32, iterations=9)
        alone.run()
        for together, single in zip(found[0][name], (alone.inner, alone.outer)):
            error = (together - single.module()).norm() / single.module().norm()
            print(f"{name} {single.name}: {error:.1e}")
            assert error < 1e-8, name


def halves(rank, count, folder):
    "Which samples each process sees in two passes of a shuffled loader"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    engine = program("darts", "distributed", 16, shuffle=True)
    torch.manual_seed(rank)  # processes whose generators differ must still agree on the order
    seen = []
    for _ in range(12):
        engine.inner.draw()
        seen.append(engine.inner.batch[0].sum(1))  # a number that tells the samples apart
    torch.save(seen, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_defect_14_the_distributed_sampler_repeats_no_batch():
    first, second = in_two_processes(halves)
    for a, b in ((0, 6), (6, 12)):
        one_pass = torch.cat(first[a:b] + second[a:b])
        assert len(one_pass.unique()) == len(one_pass) == 192
    assert not torch.equal(torch.cat(first[:6]), torch.cat(first[6:]))  # the order is new in each pass


def logging(rank, count, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    entries = []

    class Log:
        def log(self, stats, tag, step):
            entries.append(step)

    engine = program("darts", "accelerate", 16, logger=Log())
    engine.outer.module.value.data += rank  # and a program that starts differently is made alike
    engine = type(engine)(engine.problems, engine.config, {"u2l": {"outer": ["inner"]}, "l2u": {"inner": ["outer"]}})
    alike = engine.outer.module().detach().clone()
    engine.run()
    torch.save([alike, torch.tensor(entries)], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_defect_14_accelerate_starts_all_processes_alike_and_one_writes_the_log():
    (first, entries), (second, none) = in_two_processes(logging)
    assert torch.equal(first, second) and len(entries) == 8 and len(none) == 0


def resuming(rank, count, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    engine = program("cg", "distributed", 16, shuffle=True)
    engine.run(10)
    engine.save(f"{folder}/saved")
    engine.run(10)
    again = program("cg", "distributed", 16, shuffle=True)
    again.load(f"{folder}/saved")
    again.run(10)
    torch.save([p.module().detach().clone() for e in (engine, again) for p in (e.inner, e.outer)], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_several_processes_resume_bit_for_bit():
    for inner, outer, inner_again, outer_again in in_two_processes(resuming):
        assert torch.equal(inner, inner_again) and torch.equal(outer, outer_again)


def refused(rank, count, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    with pytest.raises(ValueError, match="IterativeProblem"):
        program("unroll", "distributed", 16, cls=Iterative)
    with pytest.raises(ValueError, match="6 batches|2 processes"):
        program("darts", "distributed", 192)
    torch.save([], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_what_several_processes_cannot_do_is_said():
    in_two_processes(refused)


def test_a_process_leaves_its_group_before_python_ends():
    "Where gloo's threads outlived Python, a program that had run to its end was sometimes aborted"
    code = (
        "import atexit, torch.distributed as dist\n"
        "atexit.register(lambda: print('left', not dist.is_initialized()))\n"
        "from betty_nb.distributed import join\n"
        "join('gloo', cpu=True)\n"
        "print('in it', dist.is_initialized())\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **alone}, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["in it True", "left True"], done.stderr[:2000]


def test_defect_14_torchrun():
    "The program started as a user does; gloo where there is no GPU"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.distributed_program"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]
    assert "processes 2 weights" in done.stdout
    assert sum("[outer]" in line for line in done.stdout.splitlines()) == 8  # one process writes
