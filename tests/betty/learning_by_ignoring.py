"""Domain adaptation with three levels: which source images to ignore in pretraining, such that finetuning on few target images goes well."""

import argparse

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from sklearn.datasets import load_digits
from torch import optim
from torch.utils.data import DataLoader, Dataset, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--lam", type=float, default=0.05)
parser.add_argument("--iters", type=int, default=400)
parser.add_argument("--meta_lr", type=float, default=0.1)
parser.add_argument("--type", default="cg")
parser.add_argument("--hessian", default="direct")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
images, digits = load_digits(return_X_y=True)
images, digits = torch.tensor(images).float() / 16, torch.tensor(digits)
order = torch.randperm(len(images))
images, digits = images[order], digits[order]
# The source: digits as they are, and as many of another domain: negatives that stand on their head. The target: a few digits as they are.
source, source_digits = images[:800].clone(), digits[:800]
other = torch.arange(800) % 2 == 1
source[other] = 1 - source[other].flip(1)
train_target_dataset = TensorDataset(images[800:840], digits[800:840])
valid_target_dataset = TensorDataset(images[840:940], digits[840:940])
test_target_dataset = TensorDataset(images[940:], digits[940:])


class DatasetWithIndices(Dataset):
    def __init__(self, base_dataset):
        self.base = base_dataset

    def __getitem__(self, index):
        data, target = self.base[index]
        return data, target, index

    def __len__(self):
        return len(self.base)


train_source_dataset = DatasetWithIndices(TensorDataset(source, source_digits))
train_source_loader = DataLoader(train_source_dataset, batch_size=200, shuffle=True, drop_last=True)
train_loader = DataLoader(train_target_dataset, batch_size=40, shuffle=True)
valid_loader = DataLoader(valid_target_dataset, batch_size=100, shuffle=True)


class Weights(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.raw_weights = torch.nn.Parameter(torch.zeros(n))

    def forward(self, idx):
        return self.raw_weights[idx]


class Pretraining(ImplicitProblem):
    def training_step(self, batch):
        inputs, targets, indexes = batch
        outs = self.module(inputs)
        loss_raw = F.cross_entropy(outs, targets, reduction="none")
        # reweighting
        weights = torch.sigmoid(self.reweight(indexes))
        scale = weights.sum().detach().item()
        return torch.dot(loss_raw, weights) / scale + 1e-3 * sum(p.square().sum() for p in self.module.parameters())

    def configure_train_data_loader(self):
        return train_source_loader

    def configure_module(self):
        return torch.nn.Linear(64, 10)

    def configure_optimizer(self):
        return optim.SGD(self.module.parameters(), lr=0.5)

    def configure_scheduler(self):
        return optim.lr_scheduler.StepLR(self.optimizer, step_size=args.iters // 2, gamma=0.5)


class Finetuning(ImplicitProblem):
    def training_step(self, batch):
        inputs, targets = batch
        outs = self.module(inputs)
        ce_loss = F.cross_entropy(outs, targets)
        reg_loss = 0
        for p1, p2 in zip(self.module.parameters(), self.pretrain.module.parameters()):
            reg_loss = reg_loss + (p1 - p2).pow(2).sum()
        return ce_loss + args.lam * reg_loss

    def configure_train_data_loader(self):
        return train_loader

    def configure_module(self):
        return torch.nn.Linear(64, 10)

    def configure_optimizer(self):
        return optim.SGD(self.module.parameters(), lr=0.5)


class Reweighting(ImplicitProblem):
    def training_step(self, batch):
        inputs, targets = batch
        outs = self.finetune(inputs)
        loss = F.cross_entropy(outs, targets)
        acc = (outs.argmax(dim=1) == targets).float().mean()
        return {"loss": loss, "acc": acc}

    def configure_train_data_loader(self):
        return valid_loader

    def configure_module(self):
        return Weights(len(train_source_dataset))

    def configure_optimizer(self):
        return optim.Adam(self.module.parameters(), lr=args.meta_lr, betas=(0.5, 0.999))


class LBIEngine(Engine):
    @torch.no_grad()
    def validation(self):
        inputs, targets = test_target_dataset.tensors
        outs = self.finetune(inputs)
        return {"loss": F.cross_entropy(outs, targets).item(), "acc": (outs.argmax(dim=1) == targets).float().mean().item()}


reweight_config = Config(log_step=20, retain_graph=True)
finetune_config = Config(type=args.type, unroll_steps=1, retain_graph=True, cg_iterations=5, hessian=args.hessian)
pretrain_config = Config(type=args.type, unroll_steps=4, cg_iterations=5)
engine_config = EngineConfig(train_iters=args.iters, valid_step=args.iters // 2)

reweight = Reweighting(name="reweight", config=reweight_config)
finetune = Finetuning(name="finetune", config=finetune_config)
pretrain = Pretraining(name="pretrain", config=pretrain_config)
u2l = {reweight: [pretrain]}
l2u = {pretrain: [finetune], finetune: [reweight]}
engine = LBIEngine(config=engine_config, problems=[reweight, finetune, pretrain], dependencies={"u2l": u2l, "l2u": l2u})
engine.run()

result = engine.validation()
weights = torch.sigmoid(reweight.module.raw_weights.detach())
kept = {"same domain": weights[~other].mean().item(), "other domain": weights[other].mean().item()}
