"""Neural architecture search with DARTS: which operation a small network for digits of 8 x 8 pixels needs."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import optim
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser("digits")
parser.add_argument("--iters", type=int, default=150)
parser.add_argument("--arch_lr", type=float, default=3e-2)
parser.add_argument("--channels", type=int, default=6)
parser.add_argument("--steps", type=int, default=1)  # nodes of the cell; with more of them, what is found depends on the seed
parser.add_argument("--path", default="genotype.t7")
args = parser.parse_args()

torch.manual_seed(2)
images, digits = load_digits(return_X_y=True)
images, digits = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
order = torch.randperm(len(images))
images, digits = images[order], digits[order]
train_data, test_data = TensorDataset(images[:800], digits[:800]), TensorDataset(images[800:], digits[800:])
indices, split = list(range(800)), 400
test_queue = DataLoader(test_data, batch_size=1000)

OPERATIONS = {
    "none": lambda c: Zero(),
    "skip_connect": lambda c: nn.Identity(),
    "avg_pool_3x3": lambda c: nn.AvgPool2d(3, stride=1, padding=1),
    "conv_3x3": lambda c: nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c, affine=False), nn.ReLU()),
}


class Zero(nn.Module):
    def forward(self, x):
        return 0.0 * x


class Architecture(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.alphas = nn.Parameter(1e-3 * torch.randn(sum(range(1, steps + 1)), len(OPERATIONS)))

    def forward(self):
        return self.alphas


class Network(nn.Module):
    def __init__(self, channels, steps, criterion):
        super().__init__()
        self.steps, self.criterion = steps, criterion
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 1, bias=False), nn.BatchNorm2d(channels))
        edges = sum(range(1, steps + 1))
        self.edges = nn.ModuleList(nn.ModuleList(make(channels) for make in OPERATIONS.values()) for _ in range(edges))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x, alphas):
        nodes, edge, weights = [self.stem(x)], 0, F.softmax(alphas, dim=-1)
        for _ in range(self.steps):
            total = 0
            for node in nodes:
                total = total + sum(w * operation(node) for w, operation in zip(weights[edge], self.edges[edge]))
                edge += 1
            nodes.append(total)
        return self.classifier(F.max_pool2d(nodes[-1], 4).amax((2, 3)))

    def loss(self, x, alphas, target, acc=False):
        out = self(x, alphas)
        loss = self.criterion(out, target)
        return (loss, (out.argmax(dim=1) == target).sum().item()) if acc else loss


def genotype(alphas):
    names = list(OPERATIONS)[1:]  # every edge gets an operation, as in DARTS
    return [names[i] for i in alphas[:, 1:].argmax(dim=1).tolist()]


class Outer(ImplicitProblem):
    def forward(self):
        return self.module()

    def training_step(self, batch):
        x, target = batch
        return self.inner.module.loss(x, self.forward(), target)

    def configure_train_data_loader(self):
        return DataLoader(train_data, batch_size=50, sampler=torch.utils.data.sampler.SubsetRandomSampler(indices[split:]))

    def configure_module(self):
        return Architecture(args.steps)

    def configure_optimizer(self):
        return optim.Adam(self.module.parameters(), lr=args.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)


class Inner(ImplicitProblem):
    def forward(self, x, alphas):
        return self.module(x, alphas)

    def training_step(self, batch):
        x, target = batch
        alphas = self.outer()
        return self.module.loss(x, alphas, target)

    def configure_train_data_loader(self):
        return DataLoader(train_data, batch_size=50, sampler=torch.utils.data.sampler.SubsetRandomSampler(indices[:split]))

    def configure_module(self):
        return Network(args.channels, args.steps, nn.CrossEntropyLoss())

    def configure_optimizer(self):
        return optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-4)

    def configure_scheduler(self):
        return optim.lr_scheduler.CosineAnnealingLR(self.optimizer, float(args.iters), eta_min=0.001)


class NASEngine(Engine):
    @torch.no_grad()
    def validation(self):
        corrects, total = 0, 0
        for x, target in test_queue:
            _, correct = self.inner.module.loss(x, self.outer(), target, acc=True)
            corrects += correct
            total += x.size(0)
        torch.save({"genotype": genotype(self.outer())}, args.path)
        return {"acc": corrects / total}


outer_config = Config(retain_graph=True, first_order=True)
inner_config = Config(type="darts", unroll_steps=1, gradient_clipping=5.0, warmup_steps=40)
engine_config = EngineConfig(valid_step=50, train_iters=args.iters, roll_back=False)
outer = Outer(name="outer", config=outer_config)
inner = Inner(name="inner", config=inner_config)
dependencies = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
engine = NASEngine(config=engine_config, problems=[outer, inner], dependencies=dependencies)
engine.run()


def accuracy_of(names, seed=0):
    "A network with these operations, trained from the start on all training images"
    torch.manual_seed(seed)
    alphas = torch.full((len(names), len(OPERATIONS)), -1e9)
    for edge, name in enumerate(names):
        alphas[edge, list(OPERATIONS).index(name)] = 0.0
    net = Network(args.channels, args.steps, nn.CrossEntropyLoss())
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        for x, target in DataLoader(train_data, batch_size=50, shuffle=True):
            opt.zero_grad()
            net.loss(x, alphas, target).backward()
            opt.step()
    net.eval()
    with torch.no_grad():
        return net.loss(test_data.tensors[0], alphas, test_data.tensors[1], acc=True)[1] / len(test_data)


found = torch.load(args.path, weights_only=True)["genotype"]
result = {
    "genotype": found,
    "share": F.softmax(outer.module.alphas.detach(), dim=-1)[0].max().item(),
    "alone": {name: accuracy_of([name] * len(found)) for name in list(OPERATIONS)[1:]},
}
