"""PPO and A2C over batched environments with several categorical actions (§3.4, Eq. 13).

PPO: Schulman et al. 2017 (arXiv 1707.06347); A2C: Mnih et al. 2016 (1602.01783), synchronous; GAE: Schulman et al. 2016
(1506.02438). An environment is any object with
    num_envs         number of environments stepped together, N
    obs_dim          length d of an observation (optional: without it an agent calls `reset()` once to learn it)
    reset()          -> obs, float32 array [N, d]; starts a new episode everywhere
    step(actions)    actions int64 [N, heads] -> obs [N, d], rewards [N], dones [N], info; where dones is true the
                     environment has been reset, and obs is the first observation of its next episode

Losses and initialisation follow stable-baselines3. The differences:
- an episode that ends by its step limit is a terminal: no value is bootstrapped past any done;
- the last rollout of `learn` is shortened, so that exactly ceil(total_timesteps / N) steps are taken;
- every `learn` starts with `env.reset()` and keeps weights, optimiser state and random state;
- all randomness comes from one generator per agent; no global random state is read or changed;
- approximate KL and clip fraction are means over all minibatches of an update; A2C reports the KL of its one step;
- a number that is not finite raises FloatingPointError instead of spreading into the weights.
"""

import copy
import math
from collections import deque
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 64  # units in each of the two hidden layers of actor and critic
PADDING = -1e30  # log-probability of an option that a head lacks; finite, because 0 * -inf is NaN

# lr: learning rate                        n_steps: steps per environment and rollout
# minibatch: samples per gradient step     epochs: passes over a rollout
# gamma: discount                          lam: lambda of GAE
# clip: range of the probability ratio     max_grad_norm: bound on the norm of all gradients together
# standardize: not 0: rewards of a rollout minus their mean, divided by their standard deviation
# value_coef, entropy_coef: loss = policy + value_coef * squared value error - entropy_coef * entropy
LLA_A2C = {"lr": 7e-4, "n_steps": 64, "gamma": 0.99, "lam": 1.0,
           "value_coef": 0.5, "entropy_coef": 0.01, "max_grad_norm": 0.5, "standardize": 0.0}
LLA_PPO = {**LLA_A2C, "lr": 3e-4, "n_steps": 128, "minibatch": 32, "epochs": 10, "lam": 0.95, "clip": 0.2}
HLA_PPO = {**LLA_PPO, "lr": 1e-4, "n_steps": 64}
HLA_A2C = {**LLA_A2C, "lr": 3e-4}


def gae(rewards, values, dones, last_value, gamma, lam):
    """Return generalised advantage estimates and value targets (advantages + values) of a rollout, [T, N] each.

    delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t;  A_t = delta_t + gamma lam (1 - done_t) A_{t+1}
    rewards, values float [T, N]; dones bool [T, N]: whether step t ended an episode; last_value [N]: after step T.
    """
    live = 1.0 - dones.to(values.dtype)
    deltas = rewards + gamma * torch.cat([values[1:], last_value[None]]) * live - values
    advantages, running = torch.empty_like(deltas), torch.zeros_like(last_value)
    for t in reversed(range(len(deltas))):
        running = deltas[t] + gamma * lam * live[t] * running
        advantages[t] = running
    return advantages, advantages + values


def ppo_loss(log_prob, old_log_prob, advantages, clip):
    """Return the clipped surrogate loss -E[min(r A, clip(r, 1 - clip, 1 + clip) A)] with r = pi / pi_old, and the
    fraction of samples with |r - 1| > clip. All inputs [n]."""
    ratio = torch.exp(log_prob - old_log_prob)
    loss = -torch.min(ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages).mean()
    return loss, ((ratio.detach() - 1.0).abs() > clip).float().mean()


def a2c_loss(log_prob, advantages):
    """Return the policy-gradient loss -E[A log pi(a | s)] (Eq. 13). Inputs [n]."""
    return -(advantages * log_prob).mean()


def value_loss(values, returns):
    """Return the mean squared error of the critic, without a factor 0.5 (value_coef is the only one). Inputs [n]."""
    return (values - returns).square().mean()


def approx_kl(log_prob, old_log_prob):
    """Return KL(pi_old || pi) as estimated from samples of pi_old: E[(r - 1) - log r], never negative. Inputs [n]."""
    log_ratio = (log_prob - old_log_prob).detach()
    return (torch.expm1(log_ratio) - log_ratio).mean()


def explained_variance(values, returns):
    """Return 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 as good as a constant, NaN for equal returns."""
    variance = returns.var(correction=0).item()
    return 1.0 - (returns - values).var(correction=0).item() / variance if variance else math.nan


def entropy(log_probs):
    """Return the entropy in nats, summed over the heads, of a table [n, options, heads] of log-probabilities: [n]."""
    return -(log_probs.exp() * log_probs).sum((1, 2))


def mlp(inputs, outputs, gain, generator):
    """Make two tanh layers of 64 units and a linear one: orthogonal weights of gain √2, √2 and ``gain``, biases 0."""
    layers = []
    for fan_in, fan_out, scale in ((inputs, HIDDEN, 2**0.5), (HIDDEN, HIDDEN, 2**0.5), (HIDDEN, outputs, gain)):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)  # the constructor would draw from the global generator
        nn.init.orthogonal_(layer.weight, scale, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Sequential):
    """Policy: observations [n, d] -> log-probabilities [n, max(nvec), heads], PADDING where a head has fewer options.

    A softmax over the middle dimension is several times faster than one over rows of 2 to 15 numbers.
    """

    def __init__(self, obs_dim, nvec, generator):
        super().__init__(*mlp(obs_dim, sum(nvec), 0.01, generator))
        starts, self.shape = [sum(nvec[:head]) for head in range(len(nvec))], (max(nvec), len(nvec))
        self.logit_of = torch.tensor([start + option if option < n else sum(nvec)  # the last one is the padding
                                      for option in range(max(nvec)) for start, n in zip(starts, nvec)])

    def forward(self, obs):
        logits = F.pad(super().forward(obs), (0, 1), value=PADDING)  # [n, sum(nvec) + 1]
        return logits.index_select(1, self.logit_of).view(-1, *self.shape).log_softmax(1)


class _Agent:
    """Actor, critic, optimiser and training loop of PPO and A2C.

    nvec: number of options of each action coordinate; seed: of the agent's generator; name: what errors call the agent.
    Raises TypeError for an unknown hyperparameter.
    """

    def __init__(self, env, nvec, seed=0, name=None, **hyper):
        self.env, self.nvec, self.name = env, tuple(int(n) for n in nvec), name or type(self).__name__
        if unknown := sorted(hyper.keys() - self.defaults.keys()):
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}; it has {', '.join(self.defaults)}")
        self.hyper = {**self.defaults, **hyper}
        self.obs_dim = int(env.obs_dim if hasattr(env, "obs_dim") else np.shape(env.reset())[1])
        self.generator = torch.Generator().manual_seed(int(seed))
        self.actor = Actor(self.obs_dim, self.nvec, self.generator)
        self.critic = mlp(self.obs_dim, 1, 1.0, self.generator)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = self.make_optimizer(self.parameters, lr=self.hyper["lr"])
        self.timesteps = 0  # of all environments, over the agent's life
        self.recent_rewards = deque(maxlen=100)  # for the ensemble's weights (Eq. 17)

    def learn(self, total_timesteps):
        """Reset the environment, take ceil(total_timesteps / num_envs) steps and train on every rollout.

        Returns a dictionary per update: policy_loss, value_loss, entropy, approx_kl, clip_fraction, explained_variance
        and timesteps (of the agent's life). Where something is not finite, no gradient step is made with it.
        """
        obs, left, updates = self.env.reset(), math.ceil(total_timesteps / self.env.num_envs), []
        while left > 0:
            rollout = self._collect(obs, min(self.hyper["n_steps"], left))
            updates.append(self.update(*rollout))
            obs, left = rollout[0][-1], left - len(rollout[1])
        return updates

    def _collect(self, obs, steps):
        """Play T = ``steps`` steps from ``obs``; returns observations [T + 1, N, d], actions [T, N, heads], rewards
        [T, N] and dones [T, N]."""
        n = self.env.num_envs
        observations, rewards = np.empty((steps + 1, n, self.obs_dim), np.float32), np.empty((steps, n), np.float32)
        actions, dones = np.empty((steps, n, len(self.nvec)), np.int64), np.empty((steps, n), np.bool_)
        inputs, noise = torch.from_numpy(observations), self._gumbel(steps, n)  # one draw: many small ones cost more
        observations[0] = obs
        for t in range(steps):
            with torch.no_grad():
                actions[t] = action = (self.actor(inputs[t]) + noise[t]).argmax(1).numpy()
            observations[t + 1], rewards[t], dones[t], _ = self.env.step(action)
        self.timesteps += rewards.size
        self.recent_rewards.extend(rewards.ravel().tolist())
        return inputs, torch.from_numpy(actions), torch.from_numpy(rewards), torch.from_numpy(dones)

    def update(self, observations, actions, rewards, dones):
        """Train on a rollout, shaped as in ``_collect``; returns the dictionary that ``learn`` describes."""
        self._demand_finite(observations, "an observation of the environment")
        self._demand_finite(rewards, "a reward of the environment")
        if self.hyper["standardize"]:
            rewards = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        obs, actions = observations[:-1].flatten(0, 1), actions.flatten(0, 1)
        with torch.no_grad():
            values = self.critic(observations).squeeze(-1)  # [T + 1, N]
            old_log_prob = self._evaluate(obs, actions)[0]
        advantages, returns = gae(rewards, values[:-1], dones, values[-1], self.hyper["gamma"], self.hyper["lam"])
        losses = self._improve(obs, actions, old_log_prob, advantages.flatten(), returns.flatten())
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
        return {**dict(zip(names, losses.tolist())), "explained_variance": explained_variance(values[:-1], returns),
                "timesteps": self.timesteps}

    def _evaluate(self, obs, actions):
        """Return log-probabilities (summed over heads), entropies and values, [n] each."""
        log_probs = self.actor(obs)
        return log_probs.gather(1, actions[:, None]).sum((1, 2)), entropy(log_probs), self.critic(obs).squeeze(-1)

    def _descend(self, policy_loss, value_error, mean_entropy):
        """Make one gradient step on the joint loss; the norm bound is on actor and critic together."""
        loss = policy_loss + self.hyper["value_coef"] * value_error - self.hyper["entropy_coef"] * mean_entropy
        self._demand_finite(loss, "the loss")
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.hyper["max_grad_norm"])
        self._demand_finite(norm, "the norm of the gradients")
        self.optimizer.step()

    def _demand_finite(self, numbers, what):
        if not numbers.isfinite().all():
            raise FloatingPointError(f"{self.name}: {what} is not finite")

    def predict(self, obs, deterministic=True):
        """Return actions, int64 array [n, heads], for observations [n, d]: the most probable options (lowest index in a
        tie), or a sample, which advances the generator."""
        with torch.no_grad():
            table = self.actor(torch.as_tensor(obs, dtype=torch.float32))
            return (table if deterministic else table + self._gumbel(len(table))).argmax(1).numpy()

    def _gumbel(self, *shape):
        """Draw noise [*shape, max(nvec), heads]: a sample of a categorical is the argmax of its logits plus this."""
        noise = torch.empty(*shape, *self.actor.shape).exponential_(generator=self.generator)
        return noise.clamp_(min=1e-30).log_().neg_()  # an exponential of 0 would become infinite noise

    def state_dict(self):
        """Return a copy of all that training depends on: tensors, numbers, strings, lists and dictionaries."""
        parts = {part: dict(getattr(self, part).state_dict()) for part in ("actor", "critic", "optimizer")}
        return copy.deepcopy({**parts, "generator": self.generator.get_state(),
                              "timesteps": self.timesteps, "recent_rewards": list(self.recent_rewards)})

    def load_state_dict(self, state):
        """Take over a ``state_dict()`` of an agent of the same kind; training then goes on bit for bit."""
        for part in ("actor", "critic", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["generator"])
        self.timesteps, self.recent_rewards = state["timesteps"], deque(state["recent_rewards"], maxlen=100)


class PPO(_Agent):
    """Proximal policy optimisation: several epochs of minibatches on the clipped surrogate loss, with Adam."""

    defaults, make_optimizer = LLA_PPO, staticmethod(partial(torch.optim.Adam, eps=1e-5, fused=True))

    def _improve(self, obs, actions, old_log_prob, advantages, returns):
        rows = []
        for _ in range(self.hyper["epochs"]):
            for batch in torch.randperm(len(obs), generator=self.generator).split(self.hyper["minibatch"]):
                advantage = advantages[batch]
                if len(batch) > 1:  # one sample has no standard deviation
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                log_prob, entropies, values = self._evaluate(obs[batch], actions[batch])
                policy_loss, clipped = ppo_loss(log_prob, old_log_prob[batch], advantage, self.hyper["clip"])
                terms = policy_loss, value_loss(values, returns[batch]), entropies.mean()
                self._descend(*terms)
                rows.append(torch.stack([*terms, approx_kl(log_prob, old_log_prob[batch]), clipped]).detach())
        return torch.stack(rows).double().mean(0)


class A2C(_Agent):
    """Synchronous advantage actor-critic: one RMSprop step on the whole rollout, advantages as they are."""

    defaults, make_optimizer = LLA_A2C, staticmethod(partial(torch.optim.RMSprop, alpha=0.99, eps=1e-5))

    def _improve(self, obs, actions, old_log_prob, advantages, returns):
        log_prob, entropies, values = self._evaluate(obs, actions)
        terms = a2c_loss(log_prob, advantages), value_loss(values, returns), entropies.mean()
        self._descend(*terms)
        kl = approx_kl(self._evaluate(obs, actions)[0], old_log_prob)  # before the step it is 0 by definition
        return torch.stack([*terms, kl, torch.zeros(())]).detach()
