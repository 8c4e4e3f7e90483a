"""Learning to reweight: a small network turns the loss of a training image into its weight, such that a few clean images are well classified."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--rollback", action="store_true")
parser.add_argument("--baseline", action="store_true")
parser.add_argument("--type", default="darts")
parser.add_argument("--unroll_steps", type=int, default=1)
parser.add_argument("--noise", type=float, default=0.6)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--meta_lr", type=float, default=1e-3)
parser.add_argument("--iters", type=int, default=800)
parser.add_argument("--warmup", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--best", default="best.pt")
args = parser.parse_args()

torch.manual_seed(args.seed)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images).float() / 16, torch.tensor(labels)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]
meta = TensorDataset(images[:100], labels[:100])
noisy = labels[100:1100].clone()
wrong = torch.rand(1000) < args.noise
noisy[wrong] = torch.randint(0, 10, (int(wrong.sum()),))
train = TensorDataset(images[100:1100], noisy)
test_dataloader = DataLoader(TensorDataset(images[1100:], labels[1100:]), batch_size=1000)


class MWNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 50), nn.Linear(50, 1)

    def forward(self, loss):
        return torch.sigmoid(self.last(F.relu(self.first(loss))))


class Outer(ImplicitProblem):
    def forward(self, loss):
        return self.module(loss)

    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.inner(inputs)
        loss = F.cross_entropy(outputs, labels.long())
        acc = (outputs.argmax(dim=1) == labels.long()).float().mean().item() * 100
        return {"loss": loss, "acc": acc}

    def configure_train_data_loader(self):
        return DataLoader(meta, batch_size=50, shuffle=True, drop_last=True)

    def configure_module(self):
        return MWNet()

    def configure_optimizer(self):
        return optim.Adam(self.module.parameters(), lr=args.meta_lr, weight_decay=1e-4)


class Inner(ImplicitProblem):
    def forward(self, inputs):
        return self.module(inputs)

    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.forward(inputs)
        loss_vector = F.cross_entropy(outputs, labels.long(), reduction="none")
        loss_vector_reshape = torch.reshape(loss_vector, (-1, 1))
        if args.baseline:
            return loss_vector.mean()
        weight = self.outer(loss_vector_reshape.detach())
        return torch.mean(weight * loss_vector_reshape)

    def configure_train_data_loader(self):
        return DataLoader(train, batch_size=100, shuffle=True, drop_last=True)

    def configure_module(self):
        return nn.Linear(64, 10)

    def configure_optimizer(self):
        return optim.SGD(self.module.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)

    def configure_scheduler(self):
        return optim.lr_scheduler.MultiStepLR(self.optimizer, milestones=[args.iters * 3 // 4], gamma=0.1)


best_acc = -1


class ReweightingEngine(Engine):
    @torch.no_grad()
    def validation(self):
        correct, total = 0, 0
        global best_acc
        for x, target in test_dataloader:
            x, target = x.to(self.device), target.to(self.device)
            correct += (self.inner(x).argmax(dim=1) == target).sum().item()
            total += x.size(0)
        acc = correct / total * 100
        if best_acc < acc:
            best_acc = acc
            torch.save(self.inner.state_dict(), args.best)
        return {"acc": acc, "best_acc": best_acc}


outer_config = Config(type="darts", log_step=100, retain_graph=True)
inner_config = Config(type=args.type, unroll_steps=args.unroll_steps, warmup_steps=args.warmup)
engine_config = EngineConfig(train_iters=args.iters, valid_step=100, roll_back=args.rollback)
outer = Outer(name="outer", config=outer_config)
inner = Inner(name="inner", config=inner_config)
problems = [outer, inner]
u2l = {} if args.baseline else {outer: [inner]}
l2u = {} if args.baseline else {inner: [outer]}
dependencies = {"l2u": l2u, "u2l": u2l}
engine = ReweightingEngine(config=engine_config, problems=problems, dependencies=dependencies)
engine.run()

with torch.no_grad():
    losses = F.cross_entropy(inner(train.tensors[0]), noisy, reduction="none").reshape(-1, 1)
    weights = outer(losses).flatten()
changed = noisy != labels[100:1100]
kept = {"clean": weights[~changed].mean().item(), "noisy": weights[changed].mean().item()}
