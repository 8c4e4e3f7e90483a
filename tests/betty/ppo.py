"""Proximal policy optimization: an actor and a critic on CartPole, with the environment as what both levels act on."""

import argparse

import gymnasium
import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.envs import Env
from betty.problems import ImplicitProblem
from torch.utils.data import DataLoader, IterableDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=14)
parser.add_argument("--steps_per_epoch", type=int, default=512)
parser.add_argument("--optim_iters", type=int, default=32)
parser.add_argument("--batch_size", type=int, default=128)
args = parser.parse_args()
torch.manual_seed(0)


class ActorNet(torch.nn.Module):
    def __init__(self, observations, actions):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(observations, 64), torch.nn.Tanh(), torch.nn.Linear(64, actions))

    def forward(self, state):
        pi = torch.distributions.Categorical(logits=self.net(state), validate_args=False)
        return pi, pi.sample()


class Actor(ImplicitProblem):
    def training_step(self, batch):
        pi, _ = self.module(batch["state"])
        ratio = torch.exp(pi.log_prob(batch["action"]) - batch["logp_old"])
        clipped = torch.clamp(ratio, 1 - self.env.clip_ratio, 1 + self.env.clip_ratio) * batch["adv"]
        return -torch.min(ratio * batch["adv"], clipped).mean() - 0.01 * pi.entropy().mean()

    def get_batch(self):
        return self.env.batch


class Critic(ImplicitProblem):
    def training_step(self, batch):
        return F.mse_loss(self.module(batch["state"]).squeeze(-1), batch["qval"])

    def get_batch(self):
        return self.env.batch


class ExperienceSourceDataset(IterableDataset):
    def __init__(self, generate):
        self.generate = generate

    def __iter__(self):
        return self.generate()


class PPOEnv(Env):
    def __init__(self, env, gamma=0.99, lam=0.95, clip_ratio=0.2):  # as in Betty programs, without super().__init__()
        self.env = gymnasium.make(env)
        self.gamma, self.lam, self.clip_ratio = gamma, lam, clip_ratio
        self.returns, self.batch, self.ep_return = [], None, 0.0
        self.state = torch.as_tensor(self.env.reset(seed=0)[0])
        self.train_data_loader = DataLoader(ExperienceSourceDataset(self.train_batch), batch_size=None)
        self.train_data_iterator = None

    @torch.no_grad()
    def train_batch(self):
        "One epoch in the environment, as batches that pass over it several times"
        states, actions, logps, values, rewards, ends, self.returns = [], [], [], [], [], [], []
        for _ in range(args.steps_per_epoch):
            pi, action = self.actor(self.state)
            values.append(self.critic(self.state).item())
            states.append(self.state), actions.append(action), logps.append(pi.log_prob(action))
            state, reward, terminated, truncated, _ = self.env.step(action.item())
            self.ep_return += reward
            rewards.append(reward), ends.append(terminated or truncated)
            if ends[-1]:
                self.returns.append(self.ep_return)
                self.ep_return, (state, _) = 0.0, self.env.reset()
            self.state = torch.as_tensor(state)
        # generalized advantage estimation
        adv, following, running = [], self.critic(self.state).item(), 0.0
        for reward, value, end in zip(reversed(rewards), reversed(values), reversed(ends)):
            delta = reward + self.gamma * following * (not end) - value
            running = delta + self.gamma * self.lam * (not end) * running
            adv, following = [running, *adv], value
        adv = torch.tensor(adv)
        qvals, adv = adv + torch.tensor(values), (adv - adv.mean()) / adv.std()
        data = {"state": torch.stack(states), "action": torch.stack(actions), "logp_old": torch.stack(logps), "qval": qvals, "adv": adv}
        for _ in range(args.optim_iters * args.batch_size // args.steps_per_epoch):
            for chosen in torch.randperm(len(adv)).split(args.batch_size):
                yield {key: value[chosen] for key, value in data.items()}

    def step(self):
        if self.train_data_iterator is None:
            self.train_data_iterator = iter(self.train_data_loader)
        self.batch = next(self.train_data_iterator, None)
        if self.batch is None:
            self.train_data_iterator = iter(self.train_data_loader)
            self.batch = next(self.train_data_iterator)


class PPOEngine(Engine):
    history = []

    def train_step(self):
        self.env.step()
        for leaf in self.leaves:
            leaf.step(global_step=self.global_step)

    def validation(self):
        mean = sum(self.env.returns) / len(self.env.returns)
        self.history.append(round(mean, 1))
        return {"avg_ep_reward": mean}


actor_net = ActorNet(4, 2)
critic_net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
actor = Actor(name="actor", module=actor_net, optimizer=torch.optim.Adam(actor_net.parameters(), lr=5e-3), config=Config())
critic = Critic(name="critic", module=critic_net, optimizer=torch.optim.Adam(critic_net.parameters(), lr=1e-2), config=Config())
env = PPOEnv("CartPole-v1")
engine_config = EngineConfig(train_iters=args.epochs * args.optim_iters, valid_step=args.optim_iters, strategy="cpu")
engine = PPOEngine(problems=[actor, critic], config=engine_config, dependencies={"u2l": {}, "l2u": {}}, env=env)
engine.run()
result = engine.history
