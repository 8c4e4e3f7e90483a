"""The reverse sweep on graphs of every shape."""

import time

import pytest
import torch

from betty_nb import CG, Config, Engine, EngineConfig, Exact, ImplicitProblem, check_hypergradient
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import path_shares

N, DTYPE = 4, torch.float64


class Quadratic(ImplicitProblem):
    "A level with 0.5 theta' A theta - theta' (b + sum of P x), x the parameters of the levels above and below"

    def training_step(self):
        theta, others = self.module.weight[0], [p for p in self.seen]
        loss = 0.5 * theta @ self.A @ theta - theta @ self.b
        for other, P in zip(others, self.P):
            loss = loss - theta @ P @ getattr(self, other).module.weight[0]
        return loss + 0.1 * theta.exp().sum()


def program(levels, u2l, l2u, methods=None, hessian="direct", seed=0):
    "An engine of quadratic levels, each coupled to all levels it is connected with"
    g = torch.Generator().manual_seed(seed)
    problems = []
    for name in levels:
        module = torch.nn.Linear(N, 1, bias=False, dtype=DTYPE)
        torch.nn.init.normal_(module.weight, generator=g)
        config = Config(hessian=hessian, **({"type": methods} if methods and name != levels[0] else {}))
        problem = Quadratic(name, config, module, torch.optim.SGD(module.parameters(), lr=0.1))
        M = torch.randn(N, N, generator=g, dtype=DTYPE)
        problem.A, problem.b = M @ M.T / N + torch.eye(N, dtype=DTYPE), torch.randn(N, generator=g, dtype=DTYPE)
        problem.seen = [a for a, b in u2l if b == name] + [a for a, b in l2u if b == name]
        problem.P = [0.3 * torch.randn(N, N, generator=g, dtype=DTYPE) for _ in problem.seen]
        problems.append(problem)
    return Engine(problems, EngineConfig(strategy="cpu"), {"u2l": lists(u2l), "l2u": lists(l2u)})


def lists(edges):
    return {a: [t for s, t in edges if s == a] for a, _ in edges}


def diamond(stages):
    "`top` acts on `s0`, whose optimum reaches `top` through `stages` pairs of levels side by side"
    levels, l2u = ["top", "s0"], []
    for i in range(stages):
        a, b, after = f"a{i}", f"b{i}", "top" if i == stages - 1 else f"s{i + 1}"
        levels += [a, b] + ([after] if after != "top" else [])
        l2u += [(f"s{i}", a), (f"s{i}", b), (a, after), (b, after)]
    return tuple(levels), (("top", "s0"),), tuple(l2u)


@pytest.mark.alone
def test_lower_solves_grow_linearly_with_the_stages_of_a_diamond():
    solves, seconds = {}, {}
    for stages in range(1, 9):
        engine = program(*diamond(stages), methods=CG(iterations=3))
        engine.probe("top")
        start = time.perf_counter()
        result = engine.probe("top")
        seconds[stages], solves[stages] = time.perf_counter() - start, len(result.passages)
        assert len(engine.graph.paths("top")) == 2**stages
    print("\nstages: lower solves, ms:", {s: (solves[s], round(1e3 * seconds[s], 1)) for s in solves})
    assert solves == {s: 3 * s for s in range(1, 9)}


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_shares_of_the_paths_add_up(stages):
    for method, bound in ((Exact(), 1e-12), (CG(iterations=40), 1e-12)):
        engine = program(*diamond(stages), methods=method)
        whole = engine.probe("top").indirect[0]
        shares = engine.probe("top", take=path_shares)
        assert len(shares) == 2**stages
        assert ((sum(s[0] for s in shares.values()) - whole).norm() / whole.norm()).item() < bound
    record = Debugger(program(*diamond(stages), methods=CG(iterations=1))).hypergradient("top")  # not linear in the vector
    assert record.apart > 1e-4 and "paths add up to something" in record.summary()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_diamond_against_central_differences_of_the_solved_program(stages):
    engine = program(*diamond(stages), methods=Exact())
    solve(engine)
    hypergradient = engine.probe("top").total[0].reshape(-1)
    numeric = central_differences(engine)
    assert ((hypergradient - numeric).norm() / numeric.norm()).item() < 1e-6


CHAIN = ("top", "mid", "low"), (("top", "mid"), ("mid", "low"), ("top", "low")), (("low", "mid"), ("mid", "top"), ("low", "top"))


def test_defect_4_a_middle_level_with_a_hypergradient_of_its_own():
    errors = {}
    for hessian in ("direct", "total"):
        engine = program(*CHAIN, methods=Exact(), hessian=hessian)
        solve(engine, hessian="total")
        hypergradient = engine.probe("top").total[0].reshape(-1)
        numeric = central_differences(engine, hessian="total")
        errors[hessian] = ((hypergradient - numeric).norm() / numeric.norm()).item()
    print("\nthree levels, relative error of the hypergradient:", {k: f"{v:.1e}" for k, v in errors.items()})
    assert errors["total"] < 1e-6 and errors["direct"] > 0.01


def test_checking_three_levels_solves_the_middle_one_too():
    engine = program(*CHAIN, methods=Exact(), hessian="total")
    record = check_hypergradient(engine, "top")
    print("\n", record)
    assert record.complete and record.reference < 1e-5 and all(row.after < 1e-9 for row in record.lower)
    solve(engine, hessian="total")
    assert check_hypergradient(engine, "top").error < 1e-5
    for p in engine.problems:
        p.config.hessian = "direct"
    assert check_hypergradient(engine, "top").method > 0.01


@pytest.mark.parametrize("hessian", ["direct", "total"])
def test_every_record_says_which_hessian_was_used(hessian):
    debugger = Debugger(program(*CHAIN, methods=CG(iterations=20), hessian=hessian))
    record = debugger.hypergradient("top")
    assert {s.level: s.hessian for s in record.solves} == {"mid": hessian, "low": "direct"}
    assert hessian in repr(record) and sum(p.share for p in record.paths) == pytest.approx(1, abs=1e-3)


# Solving a program to the end, without the library's own schedule


def solve(engine, hessian="direct", rounds=200):
    "Newton steps on every level but the first, from the bottom up, until their (total) gradients vanish"
    order = [k for k in engine.graph.order if k != "top"]
    for _ in range(rounds):
        for k in order:
            newton(engine, k, hessian)
        if all(gradient(engine, k, hessian).norm() < 1e-12 for k in order):
            return
    raise AssertionError("the program was not solved")


def gradient(engine, k, hessian):
    if engine.graph.receivers(k) and hessian == "total":
        return engine.probe(k).total[0].reshape(-1)
    p = engine.level(k)
    return torch.autograd.grad(p.loss(), p.module.weight)[0].reshape(-1)


def newton(engine, k, hessian):
    p = engine.level(k)
    g = gradient(engine, k, hessian)
    loss = torch.autograd.grad(p.loss(), p.module.weight, create_graph=True)[0].reshape(-1)
    H = torch.stack([torch.autograd.grad(x, p.module.weight, retain_graph=True)[0].reshape(-1) for x in loss])
    with torch.no_grad():
        p.module.weight -= 0.7 * torch.linalg.solve(H, g).reshape_as(p.module.weight)


def central_differences(engine, hessian="direct", radius=1e-5):
    "The derivative of the top level's loss by its parameters, every level below solved anew for each displacement"
    weight, kept = engine.top.module.weight, {p.name: p.module.weight.detach().clone() for p in engine.problems}
    found = []
    for i in range(N):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p in engine.problems:
                    p.module.weight.copy_(kept[p.name])
                weight[0, i] += sign * radius
            solve(engine, hessian)
            values.append(engine.top.loss().item())
        found.append((values[0] - values[1]) / (2 * radius))
    with torch.no_grad():
        for p in engine.problems:
            p.module.weight.copy_(kept[p.name])
    return torch.tensor(found, dtype=DTYPE)
