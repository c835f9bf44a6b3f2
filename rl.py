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
- agents of one kind are one network with a leading dimension, and one agent is such a network too: what an agent
  learns does not depend, to the last bit, on who learns beside it (`learn_together`);
- approximate KL and clip fraction are means over all minibatches of an update; A2C reports the KL
  that its one step caused;
- a number that is not finite raises FloatingPointError instead of spreading into the weights.
"""

import contextlib
import copy
import math
from collections import deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

HIDDEN = 64  # units in each of the two hidden layers of actor and critic
LANES = 16  # numbers in the widest vector register; see _Stack

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

    rewards, values [T, ...] and last_value [...] (of the observation after the last step) are float tensors;
    dones [T, ...] is true where step t ended an episode, whatever the reason.
    Returns advantages [T, ...] and returns = advantages + values [T, ...].
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
    """Clipped surrogate loss -E[min(r A, clip(r, 1 - clip, 1 + clip) A)], r = pi / pi_old. All inputs [..., n].

    Returns [...]: the loss, and without gradient `approx_kl` and the fraction of samples with |r - 1| > clip.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean(-1)
    with torch.no_grad():
        clip_fraction = ((ratio - 1.0).abs() > clip).float().mean(-1)
        return loss, approx_kl(log_prob, old_log_prob), clip_fraction


def a2c_loss(log_prob, advantages):
    """Policy-gradient loss -E[A log pi(a | s)] (Eq. 13). Inputs [..., n], result [...]."""
    return -(advantages * log_prob).mean(-1)


def value_loss(values, returns):
    """Mean squared error of the critic, without a factor 0.5 (value_coef is the only one). [..., n] -> [...]."""
    return (values - returns).square().mean(-1)


def approx_kl(log_prob, old_log_prob):
    """KL(pi_old || pi) estimated from samples of pi_old: E[(r - 1) - log r], never negative. [..., n] -> [...]."""
    log_ratio = log_prob - old_log_prob
    return (torch.expm1(log_ratio) - log_ratio).mean(-1)


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
    """Where each logit lies in the flattened table of `pad_heads`, and which logit fills each slot (the one after the
    last stands for the padding)."""
    slots = [option * len(nvec) + head for head, n in enumerate(nvec) for option in range(n)]
    sources = [len(slots)] * (max(nvec) * len(nvec))
    for logit, slot in enumerate(slots):
        sources[slot] = logit
    with torch.inference_mode(False):  # the cached tensors must serve under autograd too
        return torch.tensor(slots, device="cpu"), torch.tensor(sources, device="cpu")


def pad_heads(logits, nvec, padding=-math.inf):
    """Logits of all heads side by side [n, sum(nvec)] -> a table [n, max(nvec), heads], padded where a head is shorter.

    nvec is a tuple with the number of options of each head. Heads come last because a softmax over the
    middle dimension is several times faster than one over rows of 2 to 15 numbers.
    """
    padded = torch.cat([logits, logits.new_full((len(logits), 1), padding)], dim=1)
    return padded.index_select(1, _layout(nvec)[1]).view(len(logits), max(nvec), len(nvec))


def categorical_stats(logits, nvec, actions):
    """Log-probability and entropy of a product of independent categoricals, both summed over the heads.

    logits [n, sum(nvec)], nvec a tuple, actions int64 [n, heads]. Returns log_prob [n], entropy [n] (nats).
    """
    return _CategoricalStats.apply(logits, nvec, actions)


class _CategoricalStats(torch.autograd.Function):
    """`categorical_stats` with its gradient written down: autograd's way through the table takes three times as long.

    With p = softmax(logits) and H the entropy of a head: d log p_a / d logit_j = 1[j = a] - p_j and
    d H / d logit_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(ctx, logits, nvec, actions):
        table = pad_heads(logits, nvec, -1e30)  # finite, because 0 * -inf is NaN
        log_p, p = F.log_softmax(table, dim=1), F.softmax(table, dim=1)  # exp(-1e30) takes longer than a softmax
        entropy = (p * log_p).sum(1).neg_()  # [n, heads]
        chosen = actions[:, None]  # [n, 1, heads]
        ctx.save_for_backward(log_p, p, entropy, chosen)
        ctx.nvec = nvec
        return log_p.gather(1, chosen).sum((1, 2)), entropy.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy):
        log_p, p, entropy, chosen = ctx.saved_tensors
        of_choice = grad_log_prob[:, None, None]
        grad = (log_p + entropy[:, None]).mul_(grad_entropy[:, None, None]).add_(of_choice).mul_(p).neg_()
        grad.scatter_add_(1, chosen, of_choice.expand(chosen.shape))
        return grad.flatten(1).index_select(1, _layout(ctx.nvec)[0]), None, None


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
    """T steps of N environments; observations has one entry more, for what follows the last step.

    Several agents of one kind have a leading dimension A everywhere.
    """

    observations: torch.Tensor  # float32 [T + 1, N, d]
    actions: torch.Tensor  # int64 [T, N, heads]
    rewards: torch.Tensor  # float32 [T, N]
    dones: torch.Tensor  # bool [T, N]


class _Agent:
    """What PPO and A2C share: the networks, the random numbers and the saved state. Training is that of _Stack.

    env is an environment as in the module's docstring, nvec the number of options of each action
    coordinate, seed that of the agent's generator, name what errors call the agent (its algorithm unless
    given). Raises TypeError for an unknown hyperparameter or one of a wrong type and ValueError for an
    impossible value.
    """

    defaults = {}

    def __init__(self, env, nvec, seed=0, name=None, **hyper):
        self.env = env
        self.nvec = tuple(int(n) for n in nvec)
        if not self.nvec or min(self.nvec) < 1:
            raise ValueError(f"nvec needs at least one head, each with at least one option, got {self.nvec}")
        self.hyper = _resolve(type(self).__name__, self.defaults, hyper)
        self.name = name or type(self).__name__
        self.obs_dim = int(env.obs_dim if hasattr(env, "obs_dim") else np.shape(env.reset())[1])
        self.generator = torch.Generator(device="cpu").manual_seed(int(seed))
        self.actor = mlp(self.obs_dim, sum(self.nvec), 0.01, self.generator)
        self.critic = mlp(self.obs_dim, 1, 1.0, self.generator)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = self._optimizer(self.parameters, self.hyper)  # between trainings, only its state is of use
        self.timesteps = 0  # of all environments, over the agent's life
        self.recent_rewards = deque(maxlen=100)  # for the ensemble's weights, Eq. 17

    def learn(self, total_timesteps):
        """`learn_together` of this agent alone; returns its updates."""
        return learn_together([self], total_timesteps)[0]

    def update(self, rollout):
        """Train on one Rollout; returns the dictionary of diagnostics that `learn_together` describes."""
        with threads(1), _stacked([self]) as (stack,):
            return stack.update(Rollout(*(x[None] for x in rollout)))[0]

    def predict(self, obs, deterministic=True):
        """Actions, int64 array [n, heads], for observations [n, d].

        The most probable option of each head (lowest index in a tie), or with deterministic=False a sample,
        which advances the agent's generator. Raises ValueError for observations of another shape.
        """
        obs = torch.as_tensor(obs, dtype=torch.float32, device="cpu")
        if obs.ndim != 2 or obs.shape[1] != self.obs_dim:
            raise ValueError(f"observations must be [n, {self.obs_dim}], got {list(obs.shape)}")
        with torch.inference_mode():
            table = pad_heads(self.actor(obs), self.nvec)
            return (table if deterministic else table + self._gumbel(len(obs))).argmax(dim=1).numpy()

    def _gumbel(self, *shape):
        """Noise [*shape, max(nvec), heads]: a sample of a categorical is the argmax of its logits plus this."""
        noise = torch.empty(*shape, max(self.nvec), len(self.nvec), dtype=torch.float32, device="cpu")
        # The clamp keeps an exponential of 0 from becoming infinite noise: with the padding's -inf that is NaN.
        return noise.exponential_(generator=self.generator).clamp_(min=1e-30).log_().neg_()

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

    @staticmethod
    def _optimizer(parameters, hyper):
        return torch.optim.Adam(parameters, lr=hyper["lr"], eps=1e-5, fused=True)

    @staticmethod
    def _improve(stack, observations, actions, old_log_prob, advantages, returns):
        """Diagnostics [5, A] of an update on samples [A, n, ...]."""
        rows, every = [], torch.arange(len(stack.agents), device="cpu")[:, None]
        for _ in range(stack.hyper["epochs"]):
            order = torch.stack([torch.randperm(advantages.shape[1], generator=agent.generator, device="cpu")
                                 for agent in stack.agents])  # [A, n]
            shuffled = (x[every, order] for x in (observations, actions, old_log_prob, advantages, returns))
            batches = (x.split(stack.hyper["minibatch"], dim=1) for x in shuffled)
            for obs, action, old, advantage, target in zip(*batches):
                if advantage.shape[1] > 1:  # one sample has no standard deviation
                    centred = advantage - advantage.mean(1, keepdim=True)
                    advantage = centred / (advantage.std(1, keepdim=True) + 1e-8)
                log_prob, entropy, values = stack.evaluate(obs, action)
                policy_loss, kl, clipped = ppo_loss(log_prob, old, advantage, stack.hyper["clip"])
                value_error = value_loss(values, target)
                entropy = entropy.mean(-1)
                stack.descend(policy_loss, value_error, entropy)
                rows.append(torch.stack([policy_loss, value_error, entropy, kl, clipped]).detach())
        return torch.stack(rows).double().mean(dim=0)


class A2C(_Agent):
    """Synchronous advantage actor-critic: one RMSprop step on the whole rollout, advantages as they are."""

    defaults = LLA_A2C

    @staticmethod
    def _optimizer(parameters, hyper):
        return torch.optim.RMSprop(parameters, lr=hyper["lr"], alpha=0.99, eps=1e-5)

    @staticmethod
    def _improve(stack, observations, actions, old_log_prob, advantages, returns):
        """Diagnostics [5, A] of an update on samples [A, n, ...]."""
        log_prob, entropy, values = stack.evaluate(observations, actions)
        policy_loss = a2c_loss(log_prob, advantages)
        value_error = value_loss(values, returns)
        entropy = entropy.mean(-1)
        stack.descend(policy_loss, value_error, entropy)
        with torch.no_grad():  # before the step the KL is 0 by definition, so measure what the step did
            kl = approx_kl(stack.evaluate(observations, actions)[0], old_log_prob)
            return torch.stack([policy_loss, value_error, entropy, kl, torch.zeros_like(kl)])


# ---------------------------------------------------------------- training


def learn_together(agents, total_timesteps, step=None):
    """Reset every agent's environment and train each agent for ceil(total_timesteps / num_envs) steps of each.

    step(envs, actions) is called once per step with the environments of all agents that still have steps to go, in
    the order of `agents`, and their actions (int64 [N, heads] each); it returns what each env.step(actions) would,
    in a list. By default it calls just these. It runs with the caller's number of threads, the agents with one.

    An agent learns the same to the last bit alone, beside any others, and in any order, as long as its environment
    does what it would do alone.

    Returns per agent a list with one dictionary per update: policy_loss, value_loss, entropy, approx_kl,
    clip_fraction, explained_variance and timesteps (of the agent's life). Raises ValueError for total_timesteps < 1
    or observations of another shape, FloatingPointError, with the agent's name, where something is not finite (the
    weights are then those before the bad gradient step).
    """
    if total_timesteps < 1:
        raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
    step = step or _step_each
    results = {id(agent): [] for agent in agents}
    caller_threads = torch.get_num_threads()
    with threads(1), _stacked(agents) as stacks:
        for stack in stacks:
            with threads(caller_threads):
                stack.begin(total_timesteps)
        while stacks := [stack for stack in stacks if stack.steps_left]:
            actions = {id(agent): action for stack in stacks for agent, action in zip(stack.agents, stack.act())}
            active = [agent for agent in agents if id(agent) in actions]
            with threads(caller_threads):
                outcomes = step([agent.env for agent in active], [actions[id(agent)] for agent in active])
            outcomes = {id(agent): outcome for agent, outcome in zip(active, outcomes)}
            for stack in stacks:
                for agent, update in zip(stack.agents, stack.observe([outcomes[id(a)] for a in stack.agents])):
                    results[id(agent)].append(update)
    return [results[id(agent)] for agent in agents]


@contextlib.contextmanager
def threads(count):
    """Run with `count` threads in torch's operators, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step_each(envs, actions):
    return [env.step(action) for env, action in zip(envs, actions)]


@contextlib.contextmanager
def _stacked(agents):
    """The agents as _Stacks of equal ones, and on leaving, whatever happened, what they learnt in the agents."""
    groups = {}
    for agent in agents:
        made = [int(state["step"]) for state in agent.optimizer.state.values()][:1]  # Adam's bias correction needs it
        key = (*map(str, agent._identity().values()), agent.env.num_envs, *made)
        groups.setdefault(key, []).append(agent)
    stacks = [_Stack(group) for group in groups.values()]
    try:
        yield stacks
    finally:
        for stack in stacks:
            stack.unstack()


class _Stack:
    """A agents of one algorithm, shape and number of gradient steps as one network, while they are trained.

    All parameters of an agent are one row of `theta` [A, P], weights transposed, in the order of `_Agent.parameters`.
    Losses and norms are per agent, so agents do not see each other. Neither does rounding: a batched product computes
    each agent's part alike for every A, unless it has one column, which is a sum here. Rows are padded to whole vector
    registers because the last few numbers of a tensor, which do not fill one, may be rounded otherwise.
    """

    def __init__(self, agents):
        first = agents[0]
        self.agents, self.hyper, self.nvec = agents, first.hyper, first.nvec
        self.shapes = [tuple(p.T.shape) if p.ndim == 2 else (1, *p.shape) for p in first.parameters]
        self.sizes = [p.numel() for p in first.parameters]
        self.sizes.append(-sum(self.sizes) % LANES)
        self.theta = self._rows(lambda agent, p: p.detach())
        self.theta.grad = torch.zeros_like(self.theta)
        self.actor, self.critic = self._networks(self.theta)
        self.gradients = self._networks(self.theta.grad)
        self.optimizer = first._optimizer([self.theta], self.hyper)
        for key, value in first.optimizer.state.get(first.parameters[0], {}).items():
            self.optimizer.state[self.theta][key] = value.clone() if value.ndim == 0 else self._rows(
                lambda agent, p: agent.optimizer.state[p][key])

    def _rows(self, tensor_of):
        """[A, P] from a tensor like p for every agent and parameter p."""
        rows = torch.zeros(len(self.agents), sum(self.sizes), dtype=torch.float32, device="cpu")
        for agent, row in zip(self.agents, rows):
            for p, part in zip(agent.parameters, row.split(self.sizes)):
                tensor = tensor_of(agent, p)
                part.view(tensor.T.shape).copy_(tensor.T) if p.ndim == 2 else part.copy_(tensor)
        return rows

    @torch.no_grad()
    def unstack(self):
        """Give the agents their parameters and the state of their optimisers."""
        state = self.optimizer.state.get(self.theta, {})
        for index, agent in enumerate(self.agents):
            def own(rows):
                parts = rows[index].split(self.sizes)
                return [part.view(p.T.shape).T if p.ndim == 2 else part for p, part in zip(agent.parameters, parts)]

            for p, value in zip(agent.parameters, own(self.theta)):
                p.copy_(value)
            for key, value in state.items():
                values = [value] * len(agent.parameters) if value.ndim == 0 else own(value)
                for p, part in zip(agent.parameters, values):
                    agent.optimizer.state[p][key] = part.clone(memory_format=torch.contiguous_format)

    # -- acting

    def begin(self, total_timesteps):
        """Start an episode everywhere; there are ceil(total_timesteps / N) steps to go."""
        self.num_envs = self.agents[0].env.num_envs
        self.steps_left = math.ceil(total_timesteps / self.num_envs)
        self.obs = []
        for agent in self.agents:
            self.obs.append(agent.env.reset())
            if np.shape(self.obs[-1]) != (self.num_envs, agent.obs_dim):
                raise ValueError(f"reset() gave {np.shape(self.obs[-1])}, expected {(self.num_envs, agent.obs_dim)}")
        self.t = self.steps = 0

    def act(self):
        """A sampled action per environment, int64 array [A, N, heads]."""
        if self.t == self.steps:  # a new rollout
            self.t, self.steps = 0, min(self.hyper["n_steps"], self.steps_left)
            a, n, steps = len(self.agents), self.num_envs, self.steps
            self.observations = np.empty((a, steps + 1, n, self.agents[0].obs_dim), np.float32)
            self.actions = np.empty((a, steps, n, len(self.nvec)), np.int64)
            self.rewards = np.empty((a, steps, n), np.float32)
            self.dones = np.empty((a, steps, n), np.bool_)
            # one draw per rollout, because many small ones cost more
            self.noise = torch.stack([agent._gumbel(steps, n) for agent in self.agents])
            # a last layer that gives the table of pad_heads at once
            last = [pad_heads(x.flatten(0, 1), self.nvec, padding).view(*x.shape[:2], -1)
                    for x, padding in zip(self.actor[-1], (0.0, -math.inf))]
            self.policy = [*self.actor[:-1], last]
            self.observations[:, 0] = self.obs
            self.inputs = torch.from_numpy(self.observations)
        with torch.inference_mode():
            noise = self.noise[:, self.t]  # [A, N, max(nvec), heads]
            table = _forward(self.policy, self.inputs[:, self.t])[-1].view(noise.shape)
            actions = (table + noise).numpy().argmax(axis=2)
        self.actions[:, self.t] = actions
        return actions

    def observe(self, outcomes):
        """Take what the environments answered, (obs, rewards, dones, info) per agent; returns the diagnostics of each
        agent's update if that filled the rollout, else nothing."""
        for agent, (obs, rewards, dones, _) in enumerate(outcomes):
            self.observations[agent, self.t + 1] = obs
            self.rewards[agent, self.t] = rewards
            self.dones[agent, self.t] = dones
        self.t += 1
        self.steps_left -= 1
        if self.t < self.steps:
            return []
        self.obs = self.observations[:, -1]
        for agent, rewards in zip(self.agents, self.rewards):
            agent.timesteps += rewards.size
            agent.recent_rewards.extend(rewards.ravel().tolist())
        return self.update(Rollout(self.inputs, *map(torch.from_numpy, (self.actions, self.rewards, self.dones))))

    # -- the networks

    def _networks(self, theta):
        """Actor and critic as views of theta: three pairs of a weight [A, in, out] and a bias [A, 1, out] each."""
        parts = theta.split(self.sizes, dim=1)[:-1]
        parts = [part.view(-1, *shape) for part, shape in zip(parts, self.shapes)]
        layers = list(zip(parts[::2], parts[1::2]))
        return layers[:3], layers[3:]

    def evaluate(self, observations, actions):
        """Log-probabilities, entropies and values [A, n] of observations [A, n, d] and actions [A, n, heads].

        Autograd follows them back to the outputs of the networks, and `_backpropagate` from there to theta.
        """
        with torch.no_grad():
            self.outputs = [[observations, *_forward(layers, observations)] for layers in (self.actor, self.critic)]
        logits, values = (outputs[-1].requires_grad_() for outputs in self.outputs)
        both = categorical_stats(logits.flatten(0, 1), self.nvec, actions.flatten(0, 1))
        return *(x.view(logits.shape[:2]) for x in both), values.squeeze(-1)

    @torch.no_grad()
    def _backpropagate(self):
        """Fill theta.grad from the gradients of the loss with respect to the outputs of the last `evaluate`.

        y = x W + b: dW = x^T dy, db = sum of dy, dx = dy W^T; y = tanh z: dz = (1 - y^2) dy. Autograd's way through
        views of theta takes twice as long.
        """
        for layers, gradients, outputs in zip((self.actor, self.critic), self.gradients, self.outputs):
            grad = outputs[-1].grad  # [A, n, out]
            for layer in (2, 1, 0):
                inputs, (grad_weight, grad_bias) = outputs[layer], gradients[layer]
                torch.sum(grad, 1, keepdim=True, out=grad_bias)
                if grad.shape[2] == 1:
                    torch.sum(inputs * grad, 1, out=grad_weight.squeeze(2))
                else:
                    torch.bmm(inputs.mT, grad, out=grad_weight)
                if layer:
                    grad = torch.ops.aten.tanh_backward(torch.bmm(grad, layers[layer][0].mT), inputs)

    # -- learning

    def update(self, rollout):
        """Train on one Rollout of every agent; returns a dictionary of diagnostics per agent."""
        for name in ("observations", "rewards"):
            sizes = getattr(rollout, name).abs().flatten(1).amax(1)  # [A]
            self._demand(sizes.tolist(), lambda a: f"the environment gave {name} that are not finite")
        observations = rollout.observations[:, :-1].flatten(1, 2)  # [A, T * N, d]
        actions = rollout.actions.flatten(1, 2)  # [A, T * N, heads]
        with torch.no_grad():
            old_log_prob, _, values = self.evaluate(observations, actions)
            last = _forward(self.critic, rollout.observations[:, -1])[-1].mT  # [A, 1, N]
            values = torch.cat([values.view(rollout.rewards.shape), last], dim=1)  # [A, T + 1, N]
        in_time = (x.movedim(1, 0) for x in (rollout.rewards, values[:, :-1], rollout.dones))  # [T, A, N]
        estimates = gae(*in_time, values[:, -1], self.hyper["gamma"], self.hyper["lam"])
        advantages, returns = (x.movedim(0, 1).contiguous() for x in estimates)
        diagnostics = self.agents[0]._improve(
            self, observations, actions, old_log_prob, advantages.flatten(1), returns.flatten(1))
        names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
        return [{**dict(zip(names, column)),
                 "explained_variance": explained_variance(before[:-1], after),  # of the values before the update
                 "timesteps": agent.timesteps}
                for agent, column, before, after in zip(self.agents, diagnostics.T.tolist(), values, returns)]

    def descend(self, policy_loss, value_error, entropy):
        """One gradient step of every agent on its joint loss; all inputs [A]. The norm bound is on actor and critic
        together, for each agent of its own."""
        losses = policy_loss + self.hyper["value_coef"] * value_error - self.hyper["entropy_coef"] * entropy
        self._demand(losses.tolist(), lambda a: f"the loss is not finite (policy {policy_loss[a].item()}, value "
                                                f"{value_error[a].item()}, entropy {entropy[a].item()})")
        losses.backward(torch.ones_like(losses))
        self._backpropagate()
        norms = torch.linalg.vector_norm(self.theta.grad, dim=1)
        self._demand(norms.tolist(), lambda a: f"the gradient norm is not finite ({norms[a].item()})")
        self.theta.grad.mul_((self.hyper["max_grad_norm"] / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self.optimizer.step()

    def _demand(self, numbers, complaint):
        """FloatingPointError with the name of the first agent whose number (a list) is not finite."""
        for a, number in enumerate(numbers):
            if not math.isfinite(number):
                raise FloatingPointError(f"{self.agents[a].name}: {complaint(a)}")


def _forward(layers, inputs):
    """Two tanh layers and a linear one, each [A, n, in] -> [A, n, out], from their weights and biases; returns the
    three outputs."""
    (weight1, bias1), (weight2, bias2), (weight3, bias3) = layers
    hidden1 = torch.baddbmm(bias1, inputs, weight1).tanh_()
    hidden2 = torch.baddbmm(bias2, hidden1, weight2).tanh_()
    if weight3.shape[2] == 1:
        return hidden1, hidden2, (hidden2 * weight3.mT).sum(-1, keepdim=True).add_(bias3)
    return hidden1, hidden2, torch.baddbmm(bias3, hidden2, weight3)


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
