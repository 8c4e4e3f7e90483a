"A program of several processes, for `torchrun` and the tests: logistic regression with learned weight decay, printed by the first process."

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch.utils.data import DataLoader, TensorDataset

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from tests.programs import Vector


def data(seed=0, n=192):
    "Training and validation sets in double precision, standardised, n examples each"
    X, y = (torch.as_tensor(a, dtype=torch.float64) for a in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X = ((X - X.mean(0)) / X.std(0))[order]
    return [TensorDataset(X[a], y[order][a]) for a in (slice(0, n), slice(n, 2 * n))]


class Inner(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        w = self.module()
        return F.binary_cross_entropy_with_logits(x @ w, y) + (self.outer().exp() * w.square()).sum() / 2


class Iterative(IterativeProblem, Inner):
    pass


class Outer(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(x @ self.inner.module(), y) + self.module().square().sum() / 1000


def program(method, strategy, batch_size, logger="none", shuffle=False, cls=Inner, iterations=24, **config):
    torch.manual_seed(0)
    w, x = Vector(30, 0.1).double(), Vector(30, -2.0).double()
    train, valid = data()
    inner = cls(
        "inner", Config(type=method, unroll_steps=3, gradient_clipping=0.5), w, torch.optim.Adam(w.parameters(), lr=0.01),
        train_data_loader=DataLoader(train, batch_size, shuffle=shuffle),
    )  # fmt: skip
    outer = Outer("outer", Config(log_step=1), x, torch.optim.SGD(x.parameters(), lr=1.0), train_data_loader=DataLoader(valid, batch_size, shuffle=shuffle))
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    return Engine([inner, outer], EngineConfig(train_iters=iterations, strategy=strategy, logger_type=logger, **config), dependencies)


if __name__ == "__main__":
    engine = program("cg", "distributed", 16, logger="stdout", shuffle=True)
    engine.run()
    if engine.is_rank_zero():
        print("processes", engine.processes.count, "weights", engine.inner.module().sum().item())
