"""Small programs that several tests use."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from betty_nb.hypergradient import make_method

BOTH = {"u2l": {"outer": ["inner"]}, "l2u": {"inner": ["outer"]}}


class Vector(torch.nn.Module):
    "A vector of n parameters"

    def __init__(self, n=3, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((n,), value))

    def forward(self):
        return self.value


class Level(ImplicitProblem):
    "A level with a simple loss that uses the levels named in `uses`"

    uses = ()

    def training_step(self, batch):
        loss = (self.module() - 1).square().sum()
        for name in self.uses:
            loss = loss + (self.module() * getattr(self, name)()).sum()
        return loss


def level(name, config=None, uses=(), loader=True, cls=Level):
    module = Vector()
    problem = cls(name, config, module, torch.optim.SGD(module.parameters(), lr=0.1), train_data_loader=[0] if loader else None)
    problem.uses = uses
    return problem


def pair(outer=None, inner=None, dependencies=BOTH, **kwargs):
    "An engine of two levels"
    levels = [level("outer", outer, ("inner",), **kwargs), level("inner", inner, ("outer",), **kwargs)]
    return Engine(levels, EngineConfig(train_iters=50), dependencies)


def ridge_program(method="exact", seed=0, n=20, dtype=torch.float64, **options):
    """Ridge regression, solved, with a weight decay exp(x_i) for each of the n weights as the upper level; and its hypergradient by the formula

    C_inner = |X w - y|^2 / 2m + sum exp(x_i) w_i^2 / 2,   dC_outer / dx = -exp(x) * w * (H^-1 dC_outer / dw)"""
    g = torch.Generator().manual_seed(seed)
    X, Xv = (torch.randn(50, n, generator=g, dtype=torch.float64) for _ in range(2))
    y, yv = (A.sum(1) + torch.randn(50, generator=g, dtype=torch.float64) for A in (X, Xv))
    x = torch.randn(n, generator=g, dtype=torch.float64) / 2 - 1
    H = X.T @ X / 50 + torch.diag(x.exp())
    w = torch.linalg.solve(H, X.T @ y / 50)
    formula = -x.exp() * w * torch.linalg.solve(H, Xv.T @ (Xv @ w - yv) / 50)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            A, b = batch
            return 0.5 * (A @ self() - b).square().mean() + 0.5 * (self.outer().exp() * self().square()).sum()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            A, b = batch
            return 0.5 * (A @ self.inner() - b).square().mean()

    modules, problems = [Vector(n).to(dtype) for _ in range(2)], []
    for module, value in zip(modules, (w, x)):
        module.value.data.copy_(value)
    for cls, module, config, batch in ((Inner, modules[0], Config(type=method, **options), (X, y)), (Outer, modules[1], None, (Xv, yv))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        problems.append(cls(cls.__name__.lower(), config, module, optimizer, train_data_loader=[tuple(t.to(dtype) for t in batch)]))
    return Engine(problems, EngineConfig(train_iters=1000, strategy="cpu"), BOTH), formula


def noisy_program(method="cg", seed=0, dtype=torch.float32, strategy="cpu", **config):
    "Two levels with everything that makes going back hard: dropout, BatchNorm, Adam, shuffled loaders, a scheduler"
    torch.manual_seed(seed)
    x = torch.randn(60, 4)
    data = TensorDataset(x.to(dtype), (x.sum(1, keepdim=True) > 0).to(dtype))
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Softplus(), torch.nn.Linear(8, 1)
    )
    decay = Vector(1, -3.0)
    net.to(dtype), decay.to(dtype)

    class Inner(IterativeProblem if make_method(method).serves == "iterative" else ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            loss = F.binary_cross_entropy_with_logits(self.module(x), y)
            return {"loss": loss + self.outer().exp().sum() * sum(p.square().sum() for p in self.module.parameters()), "plain": loss}

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return F.binary_cross_entropy_with_logits(self.inner(x), y)

    adam = torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-4 if dtype == torch.float16 else 1e-8)  # 1e-8 is 0 in float16
    inner = Inner(
        "inner",
        Config(**{"type": method, "unroll_steps": 4, "gradient_clipping": 1.0, **config}),
        net,
        adam,
        torch.optim.lr_scheduler.StepLR(adam, 10, 0.5),
        DataLoader(data, batch_size=20, shuffle=True),
    )
    outer = Outer(
        "outer", Config(), decay, torch.optim.Adam(decay.parameters(), lr=0.05), train_data_loader=DataLoader(data, 30, shuffle=True)
    )
    return Engine([outer, inner], EngineConfig(train_iters=1000, strategy=strategy), BOTH)


def bits(engine):
    "Everything that training changes, as one list of tensors"
    state = [p.detach().clone() for q in engine.problems for p in q.module.parameters()]
    state += [b.clone() for q in engine.problems for b in q.module.buffers()]
    state += [torch.zeros(0) if p.grad is None else p.grad.clone() for q in engine.problems for p in q.module.parameters()]
    state += [
        torch.as_tensor(v).detach().clone()
        for q in engine.problems
        for s in q.optimizer.state.values()
        for v in s.values()
        if v is not None
    ]
    state += [torch.tensor(group["lr"]) for q in engine.problems for group in q.optimizer.param_groups]
    return state + [torch.get_rng_state()]


def same(a, b):
    "Whether two lists of tensors are the same, bit for bit"
    return len(a) == len(b) and all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(bytes_of(x), bytes_of(y)) for x, y in zip(a, b))


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Link(ImplicitProblem):
    "A level of `chain`: its loss uses the level above it and the one below it"

    def training_step(self, batch):
        own = self.module()
        loss = 0.5 * (self.curve * own.square()).sum() + 0.05 * own.square().square().sum() + 0.1 * own.sum().square() / len(own)
        if self.up:
            loss = loss - (own * torch.tanh(getattr(self, self.up)())).sum()
        if self.down:
            below = getattr(self, self.down)()
            loss = loss + 0.3 * (own - below).square().sum()
        return loss


def chain(levels=8, n=32, method="cg", dtype=torch.float32):
    "A chain of levels `level0` (the uppermost), `level1`, ...; each acts on the one below it, and its loss sees that one's optimum"
    names = [f"level{i}" for i in range(levels)]
    problems = []
    for i, name in enumerate(names):
        module = Vector(n, 0.1 * (i + 1)).to(dtype)
        p = Link(name, Config(type=method) if i else None, module, torch.optim.SGD(module.parameters(), lr=0.05), train_data_loader=[0])
        p.curve = torch.linspace(0.5, 2.0, n, dtype=dtype)
        p.up, p.down = names[i - 1] if i else "", names[i + 1] if i + 1 < levels else ""
        problems.append(p)
    pairs = list(zip(names, names[1:]))
    dependencies = {"u2l": {a: [b] for a, b in pairs}, "l2u": {b: [a] for a, b in pairs}}
    return Engine(problems, EngineConfig(train_iters=1000, strategy="cpu"), dependencies)
