"""Hyperparameter optimization: one strength of weight decay for each weight of a logistic regression, learned on validation data."""

import argparse

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import HigherIterativeProblem, ImplicitProblem
from sklearn.datasets import load_breast_cancer

parser = argparse.ArgumentParser()
parser.add_argument("--type", default="darts")
parser.add_argument("--meta_lr", type=float, default=1.0)
parser.add_argument("--iters", type=int, default=750)
parser.add_argument("--unroll", type=int, default=25)
args = parser.parse_args()

torch.manual_seed(0)
data = load_breast_cancer()
x, y = torch.tensor(data.data).float(), torch.tensor(data.target).float()
order = torch.randperm(len(x))
x, y = x[order], y[order]
x = (x - x[:60].mean(0)) / x[:60].std(0)
train, valid, test = (x[:60], y[:60]), (x[60:260], y[60:260]), (x[260:], y[260:])


class ChildNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(30))

    def forward(self, inputs):
        return inputs @ self.w, self.w


class ParentNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((30,), 1.0))

    def forward(self):
        return self.w


class Parent(ImplicitProblem):
    def training_step(self, batch):
        inputs, targets = batch
        outs, _ = self.inner(inputs)
        loss = F.binary_cross_entropy_with_logits(outs, targets)
        acc = ((outs > 0) == targets.bool()).float().mean().item()
        return {"loss": loss, "acc": acc}

    def configure_train_data_loader(self):
        return [valid]

    def configure_module(self):
        return ParentNet()

    def configure_optimizer(self):
        return torch.optim.SGD(self.module.parameters(), lr=args.meta_lr, momentum=0.9)

    def configure_scheduler(self):
        return torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=20, gamma=0.5)

    def param_callback(self):
        for p in self.trainable_parameters():
            p.data.clamp_(1e-8, 1.0)


class Child(HigherIterativeProblem if args.type == "itd" else ImplicitProblem):
    def training_step(self, batch):
        inputs, targets = batch
        outs, w = self.module(inputs)
        return F.binary_cross_entropy_with_logits(outs, targets) + 0.5 * (w.unsqueeze(0) @ torch.diag(self.outer()) @ w.unsqueeze(1)).sum()

    def on_inner_loop_start(self):
        if args.type == "itd":
            self.module.w.data.zero_()


class HPOEngine(Engine):
    @torch.no_grad()
    def validation(self):
        losses = {}
        for name, (inputs, targets) in (("loss", valid), ("test_loss", test)):
            losses[name] = F.binary_cross_entropy_with_logits(self.inner(inputs)[0], targets).item()
        return losses


method = {} if args.type == "itd" else {"type": args.type}
parent_config = Config(log_step=20, retain_graph=True, first_order=args.type != "itd")
child_config = Config(unroll_steps=args.unroll, cg_iterations=5, cg_alpha=1.0, neumann_iterations=5, neumann_alpha=0.5, **method)
engine_config = EngineConfig(train_iters=args.iters, valid_step=args.iters, logger_type="none")

child_net = ChildNet()
parent = Parent(name="outer", config=parent_config)
child = Child(
    name="inner",
    module=child_net,
    optimizer=torch.optim.SGD(child_net.parameters(), lr=0.5),
    train_data_loader=[train],
    config=child_config,
)
dependencies = {"l2u": {child: [parent]}, "u2l": {parent: [child]}}
engine = HPOEngine(config=engine_config, problems=[parent, child], dependencies=dependencies)
engine.run()
result = engine.validation()
