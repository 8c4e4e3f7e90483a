"""Implicit MAML: weights from which a few steps on two images a class suffice to tell classes apart that were never seen before."""

import argparse

import torch
import torch.nn.functional as F
import torch.optim as optim
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.envs import Env
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--ways", type=int, default=5)
parser.add_argument("--shots", type=int, default=2)
parser.add_argument("--inner_steps", type=int, default=8)
parser.add_argument("--task_num", type=int, default=4)
parser.add_argument("--iters", type=int, default=800)
parser.add_argument("--meta_lr", type=float, default=3e-3)
parser.add_argument("--lam", type=float, default=0.1)
args = parser.parse_args()

torch.manual_seed(1)
images, digits = load_digits(return_X_y=True)
images, digits = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
# As with Omniglot, a class turned by a quarter is another class: 40 of them, 28 to learn from and 12 to test with.
classes = [torch.rot90(images[digits == d], turn, (2, 3)) for d in range(10) for turn in range(4)]
order = torch.randperm(40).tolist()
meta_train, meta_test = [classes[i] for i in order[:28]], [classes[i] for i in order[28:]]


def sample_task(classes, generator=None):
    chosen = torch.randperm(len(classes), generator=generator)[: args.ways].tolist()
    parts = {"train": ([], []), "test": ([], [])}
    for label, c in enumerate(chosen):
        picked = torch.randperm(len(classes[c]), generator=generator)[: args.shots + 10]
        for split, index in (("train", picked[: args.shots]), ("test", picked[args.shots :])):
            parts[split][0].append(classes[c][index])
            parts[split][1].append(torch.full((len(index),), label))
    return {split: (torch.cat(x), torch.cat(y)) for split, (x, y) in parts.items()}


class TaskLoader:
    def __iter__(self):
        while True:
            yield sample_task(meta_train)


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, args.ways))


def reg_loss(parameters, reference_parameters):
    return args.lam * sum((p1 - p2).square().sum() for p1, p2 in zip(parameters, reference_parameters))


class Outer(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        out = self.inner(inputs)
        loss = F.cross_entropy(out, labels)
        acc = 100.0 * (out.argmax(dim=1) == labels).float().mean().item()
        return {"loss": loss, "acc": acc}

    def get_batch(self):
        inputs, labels = self.env.batch["test"]
        return inputs.to(self.device), labels.to(self.device)


class Inner(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        return F.cross_entropy(self.module(inputs), labels) + reg_loss(self.parameters(), self.outer.parameters())

    def get_batch(self):
        inputs, labels = self.env.batch["train"]
        return inputs.to(self.device), labels.to(self.device)

    def on_inner_loop_start(self):
        self.module.load_state_dict(self.outer.module.state_dict())


class MAMLEnv(Env):
    def __init__(self):
        super().__init__()
        self.train_data_loader = TaskLoader()
        self.train_data_iterator = iter(self.train_data_loader)
        self.batch = None

    def step(self):
        self.batch = next(self.train_data_iterator)


class MAMLEngine(Engine):
    def train_step(self):
        if self.global_step % args.inner_steps == 1 or args.inner_steps == 1:
            self.env.step()
        for leaf in self.leaves:
            leaf.step(global_step=self.global_step)

    def validation(self):
        if not hasattr(self, "best_acc"):
            self.best_acc = -1
        test_net, generator, accs = network().to(self.device), torch.Generator().manual_seed(0), []
        test_optim = optim.SGD(test_net.parameters(), lr=0.1)
        for _ in range(60):
            task = sample_task(meta_test, generator)
            test_net.load_state_dict(self.outer.module.state_dict())
            for _ in range(args.inner_steps):
                inputs, labels = task["train"]
                loss = F.cross_entropy(test_net(inputs), labels) + reg_loss(test_net.parameters(), self.outer.parameters())
                test_optim.zero_grad()
                loss.backward()
                test_optim.step()
            inputs, labels = task["test"]
            accs.append((test_net(inputs).argmax(dim=1) == labels).float().mean())
        acc = 100.0 * torch.stack(accs).mean().item()
        self.best_acc = max(acc, self.best_acc)
        return {"acc": acc, "best_acc": self.best_acc}


parent_module, child_module = network(), network()
engine_config = EngineConfig(valid_step=args.iters // 4, train_iters=args.iters)
parent_config = Config(log_step=50, retain_graph=True, gradient_accumulation=args.task_num)
child_config = Config(type="cg", cg_iterations=3, unroll_steps=args.inner_steps)
outer = Outer(
    name="outer",
    module=parent_module,
    optimizer=optim.Adam(parent_module.parameters(), lr=args.meta_lr),
    config=parent_config,
)
inner = Inner(name="inner", module=child_module, optimizer=optim.SGD(child_module.parameters(), lr=0.1), config=child_config)
env = MAMLEnv()
dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
engine = MAMLEngine(config=engine_config, problems=[outer, inner], dependencies=dependencies, env=env)
with torch.random.fork_rng():
    before = engine.validation()["acc"]
engine.run()
result = {"before": before, "after": engine.validation()["acc"]}
