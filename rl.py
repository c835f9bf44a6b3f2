"""PPO and A2C over batched environments with several categorical actions (paper §3.4, Eq. 13).

Papers: PPO, Schulman et al. 2017 (arXiv 1707.06347); A2C, the synchronous form of Mnih et al. 2016
(arXiv 1602.01783); GAE, Schulman et al. 2016 (arXiv 1506.02438). The settings are the four columns
`LLA_PPO`, `LLA_A2C`, `HLA_PPO` and `HLA_A2C` below.

An environment is any object with
    num_envs                      number of environments stepped together, N
    obs_dim                       length d of an observation (optional: without it the constructor of an
                                  agent calls `reset()` once to find out)
    reset()                       -> obs, float32 array [N, d]; starts a new episode everywhere
    step(actions int64 [N, H])    -> obs [N, d], rewards [N], dones [N], info; where dones is true the
                                  environment has been reset and obs is the first of its next episode

What differs from stable-baselines3, whose losses and initialisation are followed elsewhere:
- an episode that ends by its step limit is a terminal: no value is bootstrapped past any done;
- the last rollout of `learn` is shortened, so that exactly ceil(total_timesteps / N) steps are taken;
- every `learn` starts with `env.reset()` and keeps weights, optimiser state and random state;
- all randomness comes from one generator per agent; no global random state is read or changed;
- values and log-probabilities of a rollout are computed in one batch after it, not step by step;
- approximate KL and clip fraction are means over all minibatches of an update; A2C reports the KL
  that its one step caused;
- a number that is not finite raises FloatingPointError instead of spreading into the weights.
"""

import copy
import math
from collections import deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = 64  # units in each of the two hidden layers of actor and critic

# lr: learning rate                        n_steps: steps per environment and rollout
# minibatch: samples per gradient step     epochs: passes over a rollout
# gamma: discount                          lam: lambda of GAE
# clip: range of the probability ratio     max_grad_norm: bound on the norm of all gradients together
# value_coef, entropy_coef: loss = policy + value_coef * squared value error - entropy_coef * entropy
LLA_PPO = {
    "lr": 3e-4, "n_steps": 128, "minibatch": 32, "epochs": 10, "gamma": 0.99, "lam": 0.95,
    "clip": 0.2, "value_coef": 0.5, "entropy_coef": 0.01, "max_grad_norm": 0.5,
}  # fmt: skip
LLA_A2C = {
    "lr": 7e-4, "n_steps": 64, "gamma": 0.99, "lam": 1.0,
    "value_coef": 0.5, "entropy_coef": 0.01, "max_grad_norm": 0.5,
}  # fmt: skip
HLA_PPO = {**LLA_PPO, "lr": 1e-4, "n_steps": 64}
HLA_A2C = {**LLA_A2C, "lr": 3e-4}


# ---------------------------------------------------------------- pure functions


def gae(rewards, values, dones, last_value, gamma, lam):
    """Generalised advantage estimates of a rollout and the value targets.

    delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t;  A_t = delta_t + gamma lam (1 - done_t) A_{t+1}

    rewards, values [T, N] and last_value [N] (of the observation after the last step) are float tensors;
    dones [T, N] is true where step t ended an episode, whatever the reason.
    Returns advantages [T, N] and returns = advantages + values [T, N].
    """
    live = 1.0 - dones.to(values.dtype)
    next_values = torch.cat([values[1:], last_value[None]])
    deltas = rewards + gamma * next_values * live - values
    decay = gamma * lam * live
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(last_value)
    for t in range(len(deltas) - 1, -1, -1):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages, advantages + values


def ppo_loss(log_prob, old_log_prob, advantages, clip):
    """Clipped surrogate loss -E[min(r A, clip(r, 1 - clip, 1 + clip) A)], r = pi / pi_old. All inputs [n].

    Returns the loss, and without gradient `approx_kl` and the fraction of samples with |r - 1| > clip.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        clip_fraction = ((ratio - 1.0).abs() > clip).float().mean()
        return loss, approx_kl(log_prob, old_log_prob), clip_fraction


def a2c_loss(log_prob, advantages):
    """Policy-gradient loss -E[A log pi(a | s)] (Eq. 13). Both inputs [n]."""
    return -(advantages * log_prob).mean()


def value_loss(values, returns):
    """Mean squared error of the critic, without a factor 0.5 (value_coef is the only one). Both inputs [n]."""
    return F.mse_loss(values, returns)


def approx_kl(log_prob, old_log_prob):
    """KL(pi_old || pi) estimated from samples of pi_old: E[(r - 1) - log r], never negative. Both inputs [n]."""
    log_ratio = log_prob - old_log_prob
    return (torch.expm1(log_ratio) - log_ratio).mean()


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns) as a float: 1 is perfect, 0 no better than a constant.

    NaN where the returns do not vary (or there is only one).
    """
    variance = returns.var(correction=0).item()
    if variance == 0.0:
        return math.nan
    return 1.0 - (returns - values).var(correction=0).item() / variance


@lru_cache(maxsize=64)
def _layout(nvec):
    """Where each logit lies in the flattened [max(nvec), heads] table, and the first logit of each head."""
    slots = [option * len(nvec) + head for head, n in enumerate(nvec) for option in range(n)]
    starts = [sum(nvec[:head]) for head in range(len(nvec))]
    with torch.inference_mode(False):  # the cached tensors must serve under autograd too
        return torch.tensor(slots, device="cpu"), torch.tensor(starts, device="cpu")


def pad_heads(logits, nvec):
    """Logits of all heads side by side [n, sum(nvec)] -> a table [n, max(nvec), heads], -inf where a head is shorter.

    nvec is a tuple with the number of options of each head. Heads come last because a softmax over the
    middle dimension is several times faster than one over rows of 2 to 15 numbers.
    """
    n, width, heads = len(logits), max(nvec), len(nvec)
    return logits.new_full((n, width * heads), -math.inf).index_copy(1, _layout(nvec)[0], logits).view(n, width, heads)


def categorical_stats(logits, nvec, actions):
    """Log-probability and entropy of a product of independent categoricals, both summed over the heads.

    logits [n, sum(nvec)], nvec a tuple, actions int64 [n, heads]. Returns log_prob [n], entropy [n] (nats).
    """
    slots, starts = _layout(nvec)
    log_p = F.log_softmax(pad_heads(logits, nvec), dim=1)
    log_p = log_p.flatten(1).index_select(1, slots)  # [n, sum(nvec)]; the padding is gone, and its 0 * -inf with it
    return log_p.gather(1, actions + starts).sum(1), -(log_p.exp() * log_p).sum(1)


def mlp(inputs, outputs, gain, generator):
    """Two tanh layers of 64 units and a linear one; orthogonal weights (gains sqrt 2, sqrt 2, `gain`), zero biases."""
    layers = []
    for fan_in, fan_out, scale in ((inputs, HIDDEN, 2**0.5), (HIDDEN, HIDDEN, 2**0.5), (HIDDEN, outputs, gain)):
        # skip_init: the usual constructor would draw from the global generator
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float32, device="cpu")
        nn.init.orthogonal_(layer.weight, scale, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------- agents


class Rollout(NamedTuple):
    """T steps of N environments; observations has one entry more, for what follows the last step."""

    observations: torch.Tensor  # float32 [T + 1, N, d]
    actions: torch.Tensor  # int64 [T, N, heads]
    rewards: torch.Tensor  # float32 [T, N]
    dones: torch.Tensor  # bool [T, N]


class _Agent:
    """What PPO and A2C share: the networks, the rollout, the gradient step and the saved state.

    env is an environment as in the module's docstring, nvec the number of options of each action
    coordinate, seed that of the agent's generator. Raises TypeError for an unknown hyperparameter or one
    of a wrong type and ValueError for an impossible value.
    """

    defaults = {}

    def __init__(self, env, nvec, seed=0, **hyper):
        self.env = env
        self.nvec = tuple(int(n) for n in nvec)
        if not self.nvec or min(self.nvec) < 1:
            raise ValueError(f"nvec needs at least one head, each with at least one option, got {self.nvec}")
        self.hyper = _resolve(type(self).__name__, self.defaults, hyper)
        self.obs_dim = int(env.obs_dim if hasattr(env, "obs_dim") else np.shape(env.reset())[1])
        self.generator = torch.Generator(device="cpu").manual_seed(int(seed))
        self.actor = mlp(self.obs_dim, sum(self.nvec), 0.01, self.generator)
        self.critic = mlp(self.obs_dim, 1, 1.0, self.generator)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = self._make_optimizer()
        self.timesteps = 0  # of all environments, over the agent's life
        self.recent_rewards = deque(maxlen=100)  # for the ensemble's weights, Eq. 17

    def learn(self, total_timesteps):
        """Reset the environment and train for ceil(total_timesteps / num_envs) steps of each.

        Returns one dictionary per update with policy_loss, value_loss, entropy, approx_kl, clip_fraction,
        explained_variance and timesteps (of the agent's life). Raises ValueError for total_timesteps < 1 or
        observations of another shape, FloatingPointError where something is not finite (the weights are then
        those before the bad gradient step).
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
        steps_left = math.ceil(total_timesteps / self.env.num_envs)
        obs = self.env.reset()
        if np.shape(obs) != (self.env.num_envs, self.obs_dim):
            raise ValueError(f"reset() gave {np.shape(obs)}, expected {(self.env.num_envs, self.obs_dim)}")
        updates = []
        while steps_left > 0:
            steps = min(self.hyper["n_steps"], steps_left)
            steps_left -= steps
            rollout, obs = self._collect(obs, steps)
            self.timesteps += rollout.rewards.numel()
            self.recent_rewards.extend(rollout.rewards.flatten().tolist())
            updates.append(self.update(rollout))
        return updates

    def predict(self, obs, deterministic=True):
        """Actions, int64 array [n, heads], for observations [n, d].

        The most probable option of each head (lowest index in a tie), or with deterministic=False a sample,
        which advances the agent's generator. Raises ValueError for observations of another shape.
        """
        obs = torch.as_tensor(obs, dtype=torch.float32, device="cpu")
        if obs.ndim != 2 or obs.shape[1] != self.obs_dim:
            raise ValueError(f"observations must be [n, {self.obs_dim}], got {list(obs.shape)}")
        return self._act(obs, 0.0 if deterministic else self._gumbel(len(obs)))

    def _act(self, obs, noise):
        # A sample of a categorical is the argmax of its logits plus Gumbel noise.
        with torch.inference_mode():
            return (pad_heads(self.actor(obs), self.nvec) + noise).argmax(dim=1).numpy()

    def _gumbel(self, *shape):
        noise = torch.empty(*shape, max(self.nvec), len(self.nvec), dtype=torch.float32, device="cpu")
        # The clamp keeps an exponential of 0 from becoming infinite noise: with the padding's -inf that is NaN.
        return noise.exponential_(generator=self.generator).clamp_(min=1e-30).log_().neg_()

    def _collect(self, obs, steps):
        """Act for `steps` steps from obs [N, d]; returns the Rollout and the observation to go on from."""
        n = self.env.num_envs
        observations = np.empty((steps + 1, n, self.obs_dim), np.float32)
        actions = np.empty((steps, n, len(self.nvec)), np.int64)
        rewards = np.empty((steps, n), np.float32)
        dones = np.empty((steps, n), np.bool_)
        noise = self._gumbel(steps, n)  # one draw per rollout, because many small ones cost more
        observations[0] = obs
        inputs = torch.from_numpy(observations)
        for t in range(steps):
            # Only the network runs without gradients: the environment may train something of its own.
            action = self._act(inputs[t], noise[t])
            actions[t] = action
            obs, rewards[t], dones[t], _ = self.env.step(action)
            observations[t + 1] = obs
        return Rollout(inputs, *(torch.from_numpy(x) for x in (actions, rewards, dones))), obs

    def update(self, rollout):
        """Train on one Rollout; returns the dictionary of diagnostics that `learn` describes."""
        for name in ("observations", "rewards"):
            if not getattr(rollout, name).isfinite().all():
                raise FloatingPointError(f"{type(self).__name__}: the environment gave {name} that are not finite")
        observations = rollout.observations[:-1].flatten(0, 1)  # [T * N, d]
        actions = rollout.actions.flatten(0, 1)  # [T * N, heads]
        with torch.no_grad():
            values = self.critic(rollout.observations).squeeze(-1)  # [T + 1, N]
            old_log_prob, _ = categorical_stats(self.actor(observations), self.nvec, actions)
        advantages, returns = gae(
            rollout.rewards, values[:-1], rollout.dones, values[-1], self.hyper["gamma"], self.hyper["lam"]
        )
        diagnostics = self._improve(observations, actions, old_log_prob, advantages.flatten(), returns.flatten())
        diagnostics["explained_variance"] = explained_variance(values[:-1], returns)  # of the values before the update
        diagnostics["timesteps"] = self.timesteps
        return diagnostics

    def _descend(self, policy_loss, value_error, entropy):
        """One gradient step on the joint loss. The norm bound is on actor and critic together."""
        loss = policy_loss + self.hyper["value_coef"] * value_error - self.hyper["entropy_coef"] * entropy
        if not math.isfinite(loss.item()):
            parts = f"policy {policy_loss.item()}, value {value_error.item()}, entropy {entropy.item()}"
            raise FloatingPointError(f"{type(self).__name__}: the loss is not finite ({parts})")
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.hyper["max_grad_norm"]).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"{type(self).__name__}: the gradient norm is not finite ({norm})")
        self.optimizer.step()

    def state_dict(self):
        """All that training depends on, as a copy: tensors, numbers, strings, lists and dictionaries."""
        return copy.deepcopy(
            {
                **self._identity(),
                "actor": dict(self.actor.state_dict()),
                "critic": dict(self.critic.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "timesteps": self.timesteps,
                "recent_rewards": list(self.recent_rewards),
            }
        )

    def load_state_dict(self, state):
        """Take over a `state_dict()`; training then goes on bit for bit.

        Raises ValueError, and changes nothing, if it is of another algorithm, action or observation space,
        or has other hyperparameters.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(f"the saved agent has {key} {state[key]}, this one {mine}")
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.timesteps = state["timesteps"]
        self.recent_rewards = deque(state["recent_rewards"], maxlen=100)

    def _identity(self):
        algorithm = type(self).__name__
        return {"algorithm": algorithm, "nvec": list(self.nvec), "obs_dim": self.obs_dim, "hyper": self.hyper}


class PPO(_Agent):
    """Proximal policy optimisation: several epochs of minibatches on the clipped surrogate, with Adam."""

    defaults = LLA_PPO

    def _make_optimizer(self):
        return torch.optim.Adam(self.parameters, lr=self.hyper["lr"], eps=1e-5, fused=True)

    def _improve(self, observations, actions, old_log_prob, advantages, returns):
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
        rows = []
        for _ in range(self.hyper["epochs"]):
            order = torch.randperm(len(advantages), generator=self.generator, device="cpu")
            shuffled = (x[order] for x in (observations, actions, old_log_prob, advantages, returns))
            for obs, action, old, advantage, target in zip(*(x.split(self.hyper["minibatch"]) for x in shuffled)):
                if len(advantage) > 1:  # one sample has no standard deviation
                    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                log_prob, entropy = categorical_stats(self.actor(obs), self.nvec, action)
                policy_loss, kl, clipped = ppo_loss(log_prob, old, advantage, self.hyper["clip"])
                value_error = value_loss(self.critic(obs).squeeze(-1), target)
                entropy = entropy.mean()
                self._descend(policy_loss, value_error, entropy)
                rows.append(torch.stack([policy_loss, value_error, entropy, kl, clipped]).detach())
        return dict(zip(names, torch.stack(rows).mean(dim=0).tolist()))


class A2C(_Agent):
    """Synchronous advantage actor-critic: one RMSprop step on the whole rollout, advantages as they are."""

    defaults = LLA_A2C

    def _make_optimizer(self):
        return torch.optim.RMSprop(self.parameters, lr=self.hyper["lr"], alpha=0.99, eps=1e-5)

    def _improve(self, observations, actions, old_log_prob, advantages, returns):
        log_prob, entropy = categorical_stats(self.actor(observations), self.nvec, actions)
        policy_loss = a2c_loss(log_prob, advantages)
        value_error = value_loss(self.critic(observations).squeeze(-1), returns)
        entropy = entropy.mean()
        self._descend(policy_loss, value_error, entropy)
        with torch.no_grad():  # before the step the KL is 0 by definition, so measure what the step did
            new_log_prob, _ = categorical_stats(self.actor(observations), self.nvec, actions)
        return {
            "policy_loss": policy_loss.item(),
            "value_loss": value_error.item(),
            "entropy": entropy.item(),
            "approx_kl": approx_kl(new_log_prob, old_log_prob).item(),
            "clip_fraction": 0.0,
        }


def _resolve(algorithm, defaults, given):
    """The defaults with the given hyperparameters over them, checked against the type of each default."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise TypeError(f"{algorithm} has no hyperparameter {', '.join(unknown)}; allowed: {', '.join(defaults)}")
    for name, value in given.items():
        integer = isinstance(defaults[name], int)
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            raise TypeError(f"{algorithm}: {name} must be {'an integer' if integer else 'a number'}, got {value!r}")
        if not math.isfinite(value) or value < (1 if integer else 0):
            raise ValueError(f"{algorithm}: {name} must be finite and at least {1 if integer else 0}, got {value}")
    return {**defaults, **given}
