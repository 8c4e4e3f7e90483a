"Programs of every kind, and a process that runs one, saving now and then, until somebody kills it"

import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from betty_nb import Config, Engine, EngineConfig, ImplicitProblem, IterativeProblem
from tests.programs import BOTH, Vector, bits

KINDS = ("implicit", "iterative", "roll_back", "accumulation", "fp16", "bf16")


class Jittered(Dataset):
    "Points whose coordinates are moved a little each time they are read, with NumPy's and Python's generators"

    def __init__(self, n=40):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1, keepdim=True) > 0).float()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * random.random() + 0.1 * torch.from_numpy(np.random.randn(4)).float(), self.y[i]


class Outer(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.inner(x), y)


def build(kind):
    "An engine of the kind: dropout, BatchNorm, Adam, a scheduler, shuffled loaders"
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

    class Inner(IterativeProblem if kind == "iterative" else ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            loss = F.binary_cross_entropy_with_logits(self.module(x), y)
            return {"loss": loss + self.outer().exp().sum() * sum(p.square().sum() for p in self.module.parameters()), "plain": loss}

    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Softplus(), torch.nn.Linear(8, 1)
    net, decay = torch.nn.Sequential(*layers), Vector(1, -3.0)
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    options = {"gradient_accumulation": 3} if kind == "accumulation" else {"precision": kind} if kind in ("fp16", "bf16") else {}
    if kind == "fp16":
        options["initial_dynamic_scale"] = 2.0**24  # overflows at first, so that steps are left out
    method = {"iterative": "unroll", "implicit": "cg"}.get(kind, "darts")
    config = Config(type=method, unroll_steps=5, gradient_clipping=1.0, **options)
    data, schedule = Jittered(), torch.optim.lr_scheduler.OneCycleLR(adam, 0.05, 1000)
    inner = Inner("inner", config, net, adam, schedule, DataLoader(data, 8, shuffle=True))
    rest = {key: value for key, value in options.items() if key != "gradient_accumulation"}
    outer = Outer("outer", Config(**rest), decay, torch.optim.Adam(decay.parameters(), lr=0.05), None, DataLoader(data, 12, shuffle=True))
    return Engine([outer, inner], EngineConfig(strategy="cpu", roll_back=kind == "roll_back"), BOTH)


def fingerprint(engine):
    "A text that differs wherever a bit of the program does"
    return "\n".join(f"{list(t.shape)} {t.contiguous().reshape(-1).view(torch.uint8).sum()} {hash(t.numpy().tobytes())}" for t in bits(engine))


def work(kind, folder, iterations, seed, saves=True, slow=False, ends=True):
    "Run the program from where the last checkpoint in `folder` stands; each loss is logged, and in the end the fingerprint. Unless it `ends`, it makes 8 iterations, and saves on until it is killed"
    torch.set_num_threads(1)
    if slow:
        _slow_down(folder)
    engine, path = build(kind), os.path.join(folder, "run.pt")
    if os.path.exists(path):
        engine.load(path)
    if not ends:
        iterations = engine.completed + 8
    chance = random.Random(seed)
    until_save = chance.randrange(1, 12)
    with open(os.path.join(folder, "losses"), "a", buffering=1) as log:
        while engine.completed < iterations:
            action = engine.advance()
            if action.kind == "descend":
                log.write(f"{action} {engine.completed} {engine.level(action.level).steps} {engine.level(action.level).last_loss.item().hex()}\n")
            until_save -= 1
            if saves and not until_save:
                engine.save(path)
                until_save = chance.randrange(1, 12)
    while not ends:
        engine.save(path)
        time.sleep(0.01)
    with open(os.path.join(folder, "done"), "w") as done:
        done.write(fingerprint(engine))


def _slow_down(folder):
    "Make every save long, and say when one is in its middle"
    real = os.fsync

    def fsync(handle):
        open(os.path.join(folder, "saving"), "w").close()
        time.sleep(0.2)
        real(handle)

    os.fsync = fsync


build("implicit").inner.optimizer.step()  # torch imports a great deal with its first optimizer: now, so that no forked process has to
