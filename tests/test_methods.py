"""Every method that solves a linear system, on the same problem and against its formula; and the two solvers Betty gets wrong."""

import re
import types

import pytest
import torch
import torch.nn.functional as F

from betty_nb import CG, Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.debugger import Debugger
from betty_nb.hypergradient import METHODS, LinearSolve, make_method, register
from betty_nb.hypergradient import method as hypergradient_method
from tests.programs import BOTH, Vector, bits, noisy_program, ridge_program, same
from tests.test_sweep import diamond, program

N = 20
SOLVERS = [name for name, cls in METHODS.items() if issubclass(cls, LinearSolve)]

# Options with which a solver is to be right, and the relative error of the hypergradient then. None: the method makes no such claim.
RIGHT = {
    "cg": ({"iterations": N}, 1e-8),
    "exact": ({}, 1e-12),
    "fixed_point": ({"iterations": 300, "step_size": 0.5}, 1e-8),
    "gmres": ({"iterations": N}, 1e-8),
    "identity": ({}, None),
    "minres": ({"iterations": 2 * N}, 1e-8),
    "neumann": ({"iterations": 300, "alpha": 0.5}, 1e-8),
    "normal_cg": ({"iterations": 2 * N}, 1e-8),
    "nystrom": ({"rank": N, "damping": 1e-10}, 1e-8),
}


def right(name):
    "The method with options that suffice on `ridge_program`"
    assert name in RIGHT, f"the linear solver {name!r} has no line in RIGHT: say there with which options it is right, and to what error"
    return make_method(name, **RIGHT[name][0])


def relative_error(result, formula):
    return ((result.indirect[0].double() - formula).norm() / formula.norm()).item()


def spectrum(values):
    "A symmetric matrix with these eigenvalues, and a vector"
    g = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))[0]
    return Q @ torch.diag(values) @ Q.T, torch.randn(len(values), generator=g, dtype=torch.float64)


# The contract


@pytest.mark.parametrize("name", SOLVERS)
def test_ridge_regression_against_the_formula(name):
    engine, formula = ridge_program()
    method, most = right(name), RIGHT[name][1]
    result = engine.probe("outer", methods={"inner": method})
    error, solve = relative_error(result, formula), result.passages["inner"].solve
    print(f"{method}: error {error:.0e}, {result.passages['inner'].hvps} Hessian-vector products, {solve.status}")
    if most is None:
        assert solve.status == "fixed" and solve.advice == ""
    else:
        assert error < most and solve.status == "converged" and solve.advice == ""
    again = engine.probe("outer", methods={"inner": method})
    assert torch.equal(result.indirect[0], again.indirect[0]), "two probes of one state agree bit for bit"


@pytest.mark.parametrize("name", [name for name in SOLVERS if RIGHT.get(name, (0, 0))[1] is not None])
def test_single_precision_stays_single_and_comes_close(name):
    engine, formula = ridge_program(dtype=torch.float32)
    options = {"damping": 1e-6} if name == "nystrom" else {}
    result = engine.probe("outer", methods={"inner": make_method(right(name), **options)})
    assert result.indirect[0].dtype == torch.float32 and result.passages["inner"].solve.vector.dtype == torch.float32
    assert relative_error(result, formula) < 1e-4 and result.passages["inner"].solve.status == "converged"


@pytest.mark.parametrize("name", SOLVERS)
def test_three_times_the_steps_do_no_harm(name):
    engine, formula = ridge_program()
    method = right(name)
    for option in {"iterations", "rank"} & {*RIGHT[name][0]}:
        method = make_method(method, **{option: 3 * RIGHT[name][0][option]})
    result = engine.probe("outer", methods={"inner": method})
    assert relative_error(result, formula) < (RIGHT[name][1] or torch.inf)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_vector_of_zeros_is_solved_by_zeros(name):
    H, v = spectrum(torch.linspace(0.1, 1, N, dtype=torch.float64))
    solve = right(name).solve(H.matmul, torch.zeros_like(v))
    assert not solve.vector.any() and solve.status in ("converged", "fixed") and solve.advice == ""


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_said_and_goes_no_further(name, bad):
    H, v = spectrum(torch.linspace(0.1, 1, N, dtype=torch.float64))
    vector = v.clone()
    vector[3] = bad
    for solve in ([] if name == "identity" else [right(name).solve(lambda p: bad * (H @ p), v)]) + [right(name).solve(H.matmul, vector)]:
        assert solve.vector.isfinite().all() and solve.status == "non-finite" and "not finite" in solve.advice


@pytest.mark.parametrize("name", SOLVERS)
def test_a_method_that_says_it_is_linear_is(name):
    H, v = spectrum(torch.linspace(0.1, 1, N, dtype=torch.float64))
    u, method = v.flip(0).sin(), make_method(name)  # default options: truncated
    together = method.solve(H.matmul, 2 * u - 3 * v).vector
    apart = 2 * method.solve(H.matmul, u).vector - 3 * method.solve(H.matmul, v).vector
    off = ((together - apart).norm() / apart.norm()).item()
    assert off < 1e-10 if method.linear else off > 1e-8


@pytest.mark.parametrize("name", ["minres", "gmres", "normal_cg", "exact"])
def test_an_indefinite_hessian(name):
    H, v = spectrum(torch.cat([torch.linspace(-1, -0.2, 6, dtype=torch.float64), torch.linspace(0.1, 2, N - 6, dtype=torch.float64)]))
    exact = torch.linalg.solve(H, v)
    solve = right(name).solve(H.matmul, v)
    assert (solve.vector - exact).norm() < 1e-8 * exact.norm() and solve.status == "converged"


@pytest.mark.parametrize("name", ["cg", "neumann", "fixed_point", "nystrom"])
def test_methods_for_minima_say_so_at_a_saddle(name):
    H, v = spectrum(torch.cat([torch.linspace(-1, -0.2, 6, dtype=torch.float64), torch.linspace(0.1, 2, N - 6, dtype=torch.float64)]))
    solve = right(name).solve(H.matmul, v)
    assert solve.status in ("negative curvature", "diverging") and solve.vector.isfinite().all()
    assert re.search("negative|minimum", solve.advice)


@pytest.mark.parametrize("name", ["neumann", "fixed_point"])
def test_the_largest_admissible_step_is_named(name):
    engine, _ = ridge_program()
    step = {"neumann": "alpha", "fixed_point": "step_size"}[name]
    debugger = Debugger(engine)
    debugger.swap("inner", name, **{step: 1.0})
    (row,) = debugger.hypergradient("outer").solves
    assert row.status == "diverging"
    named = float(re.search(rf"{name}.{step} must be below ([\d.e-]*\d)", row.advice)[1])
    for factor, status in ((0.98, "converged"), (1.01, "diverging")):
        method = make_method(name, iterations=500, **{step: factor * named})
        assert engine.probe("outer", methods={"inner": method}).passages["inner"].solve.status == status


def test_advice_that_is_read_late_is_a_sentence_still():
    engine, _ = ridge_program()
    solve = engine.probe("outer", methods={"inner": make_method("neumann", iterations=20)}).passages["inner"].solve
    engine.run(5)  # the graph that the estimate would need is out of date
    assert solve.status == "diverging" and "must be below 2 / (largest eigenvalue" in solve.advice


@pytest.mark.parametrize("name", ["cg", "fixed_point", "identity", "minres", "neumann", "normal_cg"])
def test_no_number_is_read_on_the_way(name, monkeypatch):
    "Reading a number makes the CPU wait for the GPU; `gmres`, `nystrom` and `exact` do so a fixed number of times, for a small or dense decomposition"
    H, v = spectrum(torch.linspace(0.1, 1, N, dtype=torch.float64))
    monkeypatch.setattr(hypergradient_method, "free_to_read", lambda tensor: False)  # as on a GPU
    read = []
    for conversion in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        original = getattr(torch.Tensor, conversion)
        monkeypatch.setattr(torch.Tensor, conversion, lambda self, *args, f=original: read.append(f) or f(self, *args))
    solve = right(name).solve(H.matmul, v)
    assert not read
    assert solve.status and read


# Warm start


def test_warm_start_keeps_the_solution_of_training_only():
    engine, _ = ridge_program(CG(iterations=2, warm_start=True))
    debugger = Debugger(engine)
    debugger.until("outer")
    assert engine.inner.solutions == {}
    debugger.hypergradient("outer"), debugger.compare("outer", seconds=0), engine.probe("outer")
    assert engine.inner.solutions == {}, "a probe keeps nothing"
    debugger.step(6)
    kept = engine.inner.solutions[("outer", "cg")]
    engine.probe("outer")
    assert engine.inner.solutions[("outer", "cg")] is kept
    at, before = debugger.state.index, kept.clone()
    debugger.step(6)
    assert not torch.equal(engine.inner.solutions[("outer", "cg")], before)
    after = engine.inner.solutions[("outer", "cg")].clone()
    debugger.back(6)
    assert debugger.state.index == at and torch.equal(engine.inner.solutions[("outer", "cg")], before)
    debugger.step(6)
    assert torch.equal(engine.inner.solutions[("outer", "cg")], after)


def test_warm_start_comes_closer_with_the_same_steps():
    errors = {}
    for warm in (False, True):
        engine, _ = ridge_program(CG(iterations=2, warm_start=warm))
        engine.run(60)
        exact = engine.probe("outer", methods={"inner": make_method("exact")}).indirect[0]
        errors[warm] = relative_error(engine.probe("outer"), exact)
    print(errors)
    assert errors[True] < errors[False] / 10


def test_a_warm_started_run_can_be_gone_back_over():
    method = CG(iterations=3, warm_start=True)
    straight = Debugger(noisy_program(method))
    straight.step(40)
    end = bits(straight.engine)
    debugger = Debugger(noisy_program(method))
    debugger.step(40)
    debugger.back(25)
    debugger.step(25)
    assert same(bits(debugger.engine), end)


# Betty's defects


def test_defect_2_cg_does_not_depend_on_cg_alpha_and_stops_at_convergence():
    errors = {}
    for alpha in (0.1, 1.0, 7.0):
        for iterations in (6, N, N + 1, 3 * N):
            engine, formula = ridge_program("cg", cg_alpha=alpha, cg_iterations=iterations)
            result = engine.probe("outer")
            assert result.indirect[0].isfinite().all()
            errors[alpha, iterations] = relative_error(result, formula)
    print(errors)
    assert all(errors[alpha, k] == errors[1.0, k] for alpha, k in errors)
    assert errors[0.1, 6] < 0.05 and max(errors[0.1, k] for k in (N, N + 1, 3 * N)) < 1e-8


def test_defect_2_cg_has_a_curvature_guard_damping_and_a_tolerance():
    H, v = spectrum(torch.cat([torch.tensor([-0.5]).double(), torch.linspace(0.1, 1, N - 1, dtype=torch.float64)]))
    bent = CG(iterations=3 * N).solve(H.matmul, v)
    assert bent.status == "negative curvature" and bent.vector.isfinite().all() and bent.vector.norm() < 100 * v.norm()
    damped, exact = CG(iterations=N, damping=1.0).solve(H.matmul, v), torch.linalg.solve(H + torch.eye(N, dtype=torch.float64), v)
    assert (damped.vector - exact).norm() < 1e-8 * exact.norm() and damped.status == "converged"
    early = CG(iterations=100, tolerance=0.01, damping=1.0).solve(H.matmul, v)
    assert early.iterations < N and early.residual <= 0.01 and early.status == "converged"


def test_defect_3_neumann_with_the_default_alpha_does_not_diverge_silently():
    engine, formula = ridge_program("neumann", neumann_iterations=30)
    assert engine.inner.method.alpha == 1.0 and engine.inner.method.iterations == 30
    largest = torch.linalg.eigvalsh(hessian(engine))[-1].item()
    assert largest > 2
    record = Debugger(engine).hypergradient("outer")
    (row,) = record.solves
    assert record.error > 1 and row.status == "diverging"
    named = float(re.search(r"neumann.alpha must be below ([\d.e-]*\d)", row.advice)[1])
    assert abs(named / (2 / largest) - 1) < 1e-3
    engine.inner.config.neumann_alpha, engine.inner.config.neumann_iterations = 0.9 * named, 300
    assert relative_error(engine.probe("outer"), formula) < 1e-8


def hessian(engine):
    "The Hessian of the inner level, (n, n)"
    seen = []

    @register("seeing")
    def seeing(hvp, vector):
        seen.append(torch.stack([hvp(row) for row in torch.eye(N, dtype=vector.dtype)]))
        return vector

    try:
        engine.probe("outer", methods={"inner": make_method("seeing")})
    finally:
        METHODS.pop("seeing")
    return seen[0]


def test_neumann_sums_as_many_terms_as_betty():
    engine, _ = ridge_program("neumann", neumann_iterations=3, neumann_alpha=0.1)
    passage = engine.probe("outer").passages["inner"]
    H, term = hessian(engine), passage.vector
    total = term.clone()
    for _ in range(3):
        term = term - 0.1 * H @ term
        total += term
    assert torch.allclose(passage.solve.vector, 0.1 * total, rtol=1e-12, atol=0) and passage.hvps == 3


# Betty's function form


def betty_cg(vector, curr, prev, steps=N):
    "Conjugate gradient as one writes it for Betty"
    loss = curr.training_step_exec(curr.cur_batch)
    gradient = torch.autograd.grad(loss, curr.meta_trainable_parameters(), create_graph=True)
    x, r = [torch.zeros_like(v) for v in vector], [v.clone() for v in vector]
    p = [v.clone() for v in vector]
    for _ in range(steps):
        hp = torch.autograd.grad(gradient, curr.meta_trainable_parameters(), p, retain_graph=True)
        rr = sum((a * a).sum() for a in r)
        alpha = rr / sum((a * b).sum() for a, b in zip(p, hp))
        x = [a + alpha * b for a, b in zip(x, p)]
        r = [a - alpha * b for a, b in zip(r, hp)]
        beta = sum((a * a).sum() for a in r) / rr
        p = [a + beta * b for a, b in zip(r, p)]
    return [-g for g in torch.autograd.grad(gradient, prev.trainable_parameters(), x)]


@pytest.fixture
def registered():
    "Register a function under a name for one test"
    names = []

    def add(name, function):
        names.append(name)
        return register(name)(function)

    yield add
    for name in names:
        METHODS.pop(name, None)


def test_a_function_in_bettys_form(registered):
    registered("betty_cg", betty_cg)
    registered("betty_sync", lambda vector, curr, prev, sync: betty_cg(vector, curr, prev))
    for name in ("betty_cg", "betty_sync"):
        engine, formula = ridge_program(name)
        result = engine.probe("outer")
        assert relative_error(result, formula) < 1e-4 and result.passages["inner"].solve.status == "fixed"
        ours = engine.probe("outer", methods={"inner": CG(iterations=N, memory=0)})
        assert relative_error(result, ours.indirect[0]) < 1e-6
    debugger = Debugger(engine)
    comparison = debugger.compare("outer", methods=["betty_cg", "exact"], seconds=0)
    (row,) = [row for row in comparison.rows if row.method == "betty_cg"]
    assert row.error < 1e-4 and row.status == "fixed"
    engine.run(5)


def test_a_function_in_bettys_form_at_any_depth(registered):
    registered("betty_cg", lambda vector, curr, prev: betty_cg(vector, curr, prev, steps=4))
    engine = program(*diamond(2), methods="betty_cg")
    result = engine.probe("top")
    exact = engine.probe("top", methods=dict.fromkeys(result.passages, make_method("exact")))
    assert len(result.passages) == 6 and relative_error(result, exact.indirect[0].double()) < 1e-8


def test_a_function_in_bettys_form_leaves_no_trace(registered):
    registered("betty_identity", lambda vector, curr, prev: [
        -g for g in torch.autograd.grad(
            torch.autograd.grad(curr.training_step_exec(curr.cur_batch), curr.meta_trainable_parameters(), create_graph=True),
            prev.trainable_parameters(), vector)])  # fmt: skip
    debugger = Debugger(noisy_program("betty_identity"))
    debugger.until("outer")
    before = bits(debugger.engine)
    record = debugger.hypergradient("outer")
    assert same(bits(debugger.engine), before) and record.indirect > 0
    same_by_name = debugger.engine.probe("outer", methods={"inner": make_method("identity")})
    assert torch.allclose(same_by_name.indirect[0], debugger.engine.probe("outer").indirect[0], rtol=1e-5)


def test_a_function_that_returns_the_wrong_thing(registered):
    registered("short", lambda vector, curr, prev: [])
    engine, _ = ridge_program("short")
    with pytest.raises(
        ValueError, match=r"short\(vector, curr, prev\) must return one tensor for each .*'outer' with the shapes \[\(20,\)\], got \[\]"
    ):
        engine.probe("outer")
    registered("nan", lambda vector, curr, prev: [torch.full_like(p, torch.nan) for p in prev.trainable_parameters()])
    engine.inner.config.type = "nan"
    assert engine.probe("outer").passages["inner"].solve.status == "non-finite"
    with pytest.raises(TypeError, match="not one with the parameters"):
        registered("many", lambda a, b, c, d, e: None)
    middle = types.SimpleNamespace(hessian="total", kind="implicit")
    assert "set hessian='direct'" in make_method("short").refuses(middle)


def test_the_flat_options_reach_every_method_that_has_them():
    config = Config(type="neumann", neumann_iterations=7, neumann_alpha=0.3)
    assert (config.method.iterations, config.method.alpha) == (7, 0.3)


@pytest.mark.parametrize("method", ["cg", "darts", "nystrom", "unroll", "forward_mode"])
def test_sparse_gradients_of_an_embedding(method):
    def embedded(sparse):
        torch.manual_seed(0)
        words, labels = torch.randint(10, (16, 4)), torch.randint(3, (16,))
        net, decay = torch.nn.Sequential(torch.nn.Embedding(10, 8, sparse=sparse), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double(), Vector(1, -2.0).double()

        class Inner(IterativeProblem if method in ("unroll", "forward_mode") else ImplicitProblem):
            def training_step(self, batch):
                return F.cross_entropy(self.module(batch[0]).mean(1), batch[1]) + self.outer().exp().sum() * self.module[2].weight.square().sum()

        class Outer(ImplicitProblem):
            def training_step(self, batch):
                return F.cross_entropy(self.inner(batch[0]).mean(1), batch[1])

        inner = Inner("inner", Config(type=method, unroll_steps=3), net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), train_data_loader=[(words, labels)])
        outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1), train_data_loader=[(words.flip(0), labels)])
        return Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH)

    engines = embedded(False), embedded(True)
    engines[0].run(9)
    if method == "forward_mode":  # torch has none for sparse tensors
        with pytest.raises(NotImplementedError, match="no forward mode for something in 'inner'.*use unroll"):
            engines[1].run(9)
        return
    engines[1].run(9)
    dense, sparse = (engine.probe("outer").total[0] for engine in engines)
    torch.testing.assert_close(dense, sparse, rtol=1e-9, atol=0)
    Debugger(engines[1]).back(2)


@pytest.mark.parametrize("method", METHODS)
def test_complex_parameters(method):
    "Methods written for real numbers refuse them; the others give what they give for real and imaginary parts"
    iterative = METHODS[method].serves == "iterative"

    class Net(torch.nn.Module):
        def __init__(self, real):
            super().__init__()
            w = torch.randn(6, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
            self.w = torch.nn.Parameter(torch.view_as_real(w).clone() if real else w)

        def forward(self, x):
            return (x.cdouble() @ (self.w if self.w.is_complex() else torch.view_as_complex(self.w))).abs()

    class Inner(IterativeProblem if iterative else ImplicitProblem):
        def training_step(self, batch):
            return F.cross_entropy(self.module(batch[0]), batch[1]) + self.outer().exp().sum() * self.module.w.abs().square().sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return F.cross_entropy(self.inner(batch[0].flip(0)), batch[1])

    def program(real):
        net, decay, batch = Net(real), Vector(1, -2.0).double(), (torch.arange(48.0).view(8, 6).sin().double(), torch.arange(8) % 3)
        inner = Inner("inner", Config(type=method, unroll_steps=3), net, torch.optim.SGD(net.parameters(), lr=0.1), train_data_loader=[batch])
        outer = Outer("outer", None, decay, torch.optim.SGD(decay.parameters(), lr=0.1), train_data_loader=[batch])
        return Engine([outer, inner], EngineConfig(strategy="cpu"), BOTH)

    if method not in ("darts", "sama", "unroll"):
        with pytest.raises(ValueError, match=f"'w' is complex, and {method} is written for real numbers.*'darts'"):
            program(False)
        return
    found = []
    for real in (True, False):
        engine = program(real)
        engine.run(9)
        found.append(engine.probe("outer").total[0])
    torch.testing.assert_close(*found, rtol=1e-4 if method != "unroll" else 1e-9, atol=0)
