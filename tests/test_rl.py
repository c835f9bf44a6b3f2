"""Tests of rl.py: numbers worked out by hand, exact step counts, seeds, resuming, and learning over five steps."""

import math

import numpy as np
import pytest
import torch

import rl
from networks import same, through_a_file
from rl import A2C, PPO

both = pytest.mark.parametrize("agent_class", [PPO, A2C])


class Taped:
    """Episodes of three steps, staggered by one per environment; observations are [step in episode, environment]. The
    reward depends on the actions, so that different actions lead to different training."""
    obs_dim, num_envs = 2, 2

    def __init__(self):
        self.calls = []

    def _observe(self):
        return np.stack([self.clock, np.arange(self.num_envs)], axis=1).astype(np.float32)

    def reset(self):
        self.calls.append("reset")
        self.clock = np.arange(self.num_envs)
        return self._observe()

    def step(self, actions):
        self.calls.append("step")
        assert actions.dtype == np.int64 and actions.shape[0] == self.num_envs
        rewards = actions.sum(axis=1) * 0.1 + self.clock
        self.clock = (self.clock + 1) % 3
        return self._observe(), rewards, self.clock == 0, {}


def small(agent_class, seed=0, **hyper):
    return agent_class(Taped(), (2, 3), seed=seed, **{"n_steps": 4, **hyper})


def taped_rollouts(agent):
    """Every rollout (observations, actions, rewards, dones) that an agent trains on, while training runs as usual."""
    kept, update = [], agent.update
    agent.update = lambda *rollout: kept.append(rollout) or update(*rollout)
    return kept


def zeroed(agent_class, nvec=(2,), **hyper):
    """An agent whose weights are all zero. Hidden units are 0 and its logits the last layer's bias; only the last two
    biases get a gradient, and each update can be followed on paper."""
    agent = agent_class(Taped(), nvec, **hyper)
    for p in agent.parameters:
        p.data.zero_()
    return agent


def one_step(actions, rewards):
    """A rollout of one step of len(actions) environments that all end there; the observations do not matter."""
    n = len(actions)
    return (torch.ones(2, n, 2), torch.tensor(actions).view(1, n, 1), torch.tensor(rewards).view(1, n),
            torch.ones(1, n, dtype=torch.bool))


@pytest.mark.parametrize("lam, expected", [
    # Environment 0 ends an episode at t = 1. deltas: 1 + 0.9*2 - 0.5 = 2.3;  3 - 2 = 1;  5 + 0.9*4 - 1 = 7.6
    # Environment 1 never ends.               deltas: 2 - 0.9 - 1 = 0.1;  -1 + 1.8 + 1 = 1.8;  0.5 + 2.7 - 2 = 1.2
    # Environment 2 ends at the last step, so its last_value of 100 counts for nothing. deltas: 0, 0, 1
    (0.95, [[3.155, 2.51623, 0.731025], [1.0, 2.826, 0.855], [7.6, 1.2, 1.0]]),
    (1.0, [[3.2, 2.692, 0.81], [1.0, 2.88, 0.9], [7.6, 1.2, 1.0]])])
def test_gae_by_hand(lam, expected):
    rewards = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0], [5.0, 0.5, 1.0]])
    values = torch.tensor([[0.5, 1.0, 0.0], [2.0, -1.0, 0.0], [1.0, 2.0, 0.0]])
    dones = torch.tensor([[False, False, False], [True, False, False], [False, False, True]])
    advantages, returns = rl.gae(rewards, values, dones, torch.tensor([4.0, 3.0, 100.0]), 0.9, lam)
    torch.testing.assert_close(advantages, torch.tensor(expected))
    torch.testing.assert_close(returns, torch.tensor(expected) + values)


def test_ppo_loss_by_hand():
    #   ratio   A    min(ratio A, clipped A)
    #    1.1   +2     2.2    inside
    #    1.5   +1     1.2    clipped
    #    1.5   -1    -1.5    outside, but the unclipped term is the smaller one
    #    0.5   +1     0.5    the same from below
    #    0.5   -2    -1.6    clipped
    ratio = torch.tensor([1.1, 1.5, 1.5, 0.5, 0.5])
    old = torch.tensor([-1.0, -0.3, -2.0, -0.7, -1.5])
    log_prob = (old + ratio.log()).requires_grad_()
    loss, clip_fraction = rl.ppo_loss(log_prob, old, torch.tensor([2.0, 1.0, -1.0, 1.0, -2.0]), 0.2)
    loss.backward()
    assert (loss.item(), clip_fraction.item()) == pytest.approx((-0.16, 0.8), abs=1e-6)
    # (r - 1) - ln r: 0.0046898 once, 0.0945349 twice, 0.1931472 twice
    assert rl.approx_kl(log_prob, old).item() == pytest.approx(0.1160108, abs=1e-6)
    # d loss / d log_prob = -ratio A / 5 where the unclipped term is taken, 0 where the clipped one is
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.44, 0.0, 0.3, -0.1, 0.0]))


def test_a_rollout_that_ends_inside_an_episode_counts_the_value_of_what_follows():
    agent, observations = zeroed(A2C), torch.tensor([1.0, 2.0, 7.0]).view(3, 1, 1).expand(3, 1, 2)
    agent.critic = lambda observed: observed[..., :1]  # values 1 and 2, and 7 after the rollout
    told = agent.update(observations, torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2, 1) > 0)
    first, second = 0.99**2 * 7 - 1, 0.99 * 7 - 2  # returns (lambda is 1) minus values; log-probabilities are -ln 2
    assert told["policy_loss"] == pytest.approx(math.log(2) * (first + second) / 2)
    assert told["value_loss"] == pytest.approx((first**2 + second**2) / 2)


@pytest.mark.parametrize("values, returns, variance", [
    ([1.0, 2.0, 2.0], [1.0, 2.0, 3.0], 2 / 3), ([11.0, 12.0, 13.0], [1.0, 2.0, 3.0], 1.0),
    ([-1.0, -2.0, -3.0], [1.0, 2.0, 3.0], -3.0), ([1.0, 2.0, 3.0], [1.0] * 3, math.nan)])
def test_explained_variance_by_hand(values, returns, variance):
    assert rl.explained_variance(torch.tensor(values), torch.tensor(returns)) == pytest.approx(variance, nan_ok=True)


def test_log_prob_and_entropy_of_unequal_heads_and_their_gradients_by_hand():
    agent = zeroed(PPO, (2, 3))  # heads (1/4, 3/4) and (1/4, 1/4, 1/2), actions 1 and 2
    agent.actor[-1].bias.data = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]).log()
    log_prob, entropy, _ = agent._evaluate(torch.ones(1, 2), torch.tensor([[1, 2]]))
    assert log_prob.item() == pytest.approx(-0.9808293, abs=1e-6)  # ln 3/4 + ln 1/2
    assert entropy.item() == pytest.approx(1.6020560, abs=1e-6)  # 0.5623351 + 1.0397208
    (grad,) = torch.autograd.grad(log_prob.sum(), agent.actor[-1].bias, retain_graph=True)
    torch.testing.assert_close(grad, torch.tensor([-0.25, 0.25, -0.25, -0.25, 0.5]))  # 1[a] - p
    (grad,) = torch.autograd.grad(entropy.sum(), agent.actor[-1].bias)
    # -p (ln p + H) per head: -(1/4)(-1.3862944 + 0.5623351) = 0.2059898; -(1/4)(-1.3862944 + 1.0397208) = 0.0866434
    torch.testing.assert_close(grad, torch.tensor([0.2059898, -0.2059898, 0.0866434, 0.0866434, -0.1732868]))


@pytest.mark.parametrize("max_grad_norm, policy_step, value_step", [
    # Action 1 of two, advantage 1, value 0: the gradient is (0.5, -0.5) on the logits and -1 on the value,
    # norm sqrt(1.5), so the bound scales it by max_grad_norm / 1.2247449. RMSprop's first step is
    # lr g / (sqrt(0.01) |g| + 1e-5):
    #   0.5:  g = 0.2041241 and 0.4082483;          1e-4:  g = 4.0824829e-5 and 8.1649658e-5
    (0.5, 6.9965721e-3, 6.9982857e-3), (1e-4, 2.0292887e-3, 3.1464278e-3)])
def test_a2c_update_by_hand(max_grad_norm, policy_step, value_step):
    agent = zeroed(A2C, max_grad_norm=max_grad_norm)
    diagnostics = agent.update(*one_step([1], [1.0]))
    assert agent.actor[-1].bias.tolist() == pytest.approx([-policy_step, policy_step], rel=1e-4)
    assert agent.critic[-1].bias.item() == pytest.approx(value_step, rel=1e-4)
    others = [p for p in agent.parameters if p is not agent.actor[-1].bias and p is not agent.critic[-1].bias]
    assert len(others) == 10 and not any(p.any() for p in others)
    assert diagnostics["entropy"] == pytest.approx(math.log(2), abs=1e-6)
    # after the step r = 2 sigmoid(2 policy_step), and (r - 1) - ln r = (r - 1)^2 / 2 to leading order
    assert diagnostics["approx_kl"] == pytest.approx(policy_step**2 / 2, rel=0.02, abs=1e-7)
    assert diagnostics["clip_fraction"] == 0.0


@pytest.mark.parametrize("agent_class, hyper, prior, actions, rewards, step", [
    # Probabilities (1/4, 3/4) and no advantage: only -0.01 H is left, whose gradient is -+0.002059898.
    # A2C: 7e-4 g / (0.1 g + 1e-5); PPO's one sample in one epoch, Adam: 3e-4 g / (g + 1e-5).
    (A2C, {}, math.log(3), [1], [0.0], 6.6758e-3), (PPO, {"epochs": 1}, math.log(3), [1], [0.0], 2.98551e-4),
    # PPO keeps the advantage of a single sample: gradient +-0.125, bounded to 1e-5 / sqrt 2 = 7.0710678e-6 each; Adam:
    # 3e-4 * 7.071e-6 / (7.071e-6 + 1e-5).
    (PPO, {"epochs": 1, "value_coef": 0, "entropy_coef": 0, "max_grad_norm": 1e-5}, 0, [1], [0.25], -1.242641e-4),
    # A2C does not normalise: both advantages push towards action 0, gradient -(0.5, -0.5)(1 + 3)/2; lr / (0.1 + 1e-5).
    (A2C, {"value_coef": 0, "max_grad_norm": 1e9, "lr": 1}, 0, [0, 0], [1.0, 3.0], 9.999)])
def test_one_step_of_the_policy_by_hand(agent_class, hyper, prior, actions, rewards, step):
    agent = zeroed(agent_class, **hyper)
    agent.actor[-1].bias.data[1] = prior
    agent.update(*one_step(actions, rewards))
    assert agent.actor[-1].bias.tolist() == pytest.approx([step, prior - step], rel=1e-4)
    assert agent.critic[-1].bias.item() == 0.0


def test_ppo_update_of_two_epochs_by_hand():
    # Two samples in one minibatch: actions 0 and 1 with advantages 1 and 3, normalised to -+0.7071068 (the
    # standard deviation of two numbers is sqrt 2). Adam at lr 0.5 moves by about 0.5 in its first step.
    # Epoch 1: ratios 1; logit gradient +-0.3535534, value gradient -2, bound: times 0.5 / 2.0615528 = 0.2425356.
    # Epoch 2: p = (0.2689414, 0.7310586), ratios 0.5378828 and 1.4621172; both are clipped, so the logits have
    #   no gradient and move on by momentum alone: 0.5 (0.09/0.19) / sqrt(0.000999/0.001999) = 0.3350297.
    #   Value 0.5, gradient -1.5, bound to -0.5: m = 0.4929284, v = 0.2426512, step 0.5003367.
    agent = zeroed(PPO, lr=0.5, epochs=2, entropy_coef=0.0)
    diagnostics = agent.update(*one_step([0, 1], [1.0, 3.0]))
    assert agent.actor[-1].bias.tolist() == pytest.approx([-0.83503, 0.83503], abs=2e-4)
    assert agent.critic[-1].bias.item() == pytest.approx(1.00034, abs=2e-4)
    # means over the two epochs
    assert diagnostics["policy_loss"] == pytest.approx(-0.0707107, abs=1e-4)  # 0 and -(0.7071068/2)(1.2 - 0.8)
    assert diagnostics["value_loss"] == pytest.approx(4.125, abs=1e-3)  # (1 + 9)/2 and (0.25 + 6.25)/2
    assert diagnostics["entropy"] == pytest.approx(0.637675, abs=1e-4)  # ln 2 and 0.582203
    assert diagnostics["approx_kl"] == pytest.approx(0.060057, abs=1e-4)  # 0 and (0.157998 + 0.082232)/2
    assert diagnostics["clip_fraction"] == pytest.approx(0.5)  # 0 and 1
    assert diagnostics["explained_variance"] == pytest.approx(0.0)  # the values before the update are all 0


def test_ppo_minibatches_cover_every_sample_once_per_epoch():
    agent = PPO(Taped(), (2,), minibatch=3, epochs=2)
    seen, evaluate = [], agent._evaluate
    agent._evaluate = lambda obs, actions: seen.append(obs[:, 0].tolist()) or evaluate(obs, actions)
    agent.update(torch.arange(9.0).view(9, 1, 1).expand(9, 1, 2), torch.zeros(8, 1, 1, dtype=torch.int64),
                 torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.bool))
    minibatches = seen[1:]  # the first call is about the whole rollout
    assert [len(m) for m in minibatches] == [3, 3, 2, 3, 3, 2]
    epochs = [sum(minibatches[:3], []), sum(minibatches[3:], [])]
    assert all(sorted(e) == list(range(8)) for e in epochs) and epochs[0] != epochs[1]


def test_initialisation():
    agent = PPO(Taped(), (5, 3))
    shapes = [(64, 2), (64,), (64, 64), (64,), (8, 64), (8,), (64, 2), (64,), (64, 64), (64,), (1, 64), (1,)]
    assert [tuple(p.shape) for p in agent.parameters] == shapes
    assert not any(p.any() for p in agent.parameters if p.ndim == 1)
    for net, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert [type(layer) for layer in net] == [torch.nn.Linear, torch.nn.Tanh] * 2 + [torch.nn.Linear]
        first, second, head = net[0].weight, net[2].weight, net[4].weight
        torch.testing.assert_close(first.T @ first, 2 * torch.eye(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(second @ second.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
        torch.testing.assert_close(head @ head.T, gain**2 * torch.eye(len(head)), atol=1e-5 * gain**2, rtol=0)
    assert not torch.equal(agent.actor[0].weight, agent.critic[0].weight)


@both
def test_an_agent_is_a_function_of_its_seed_and_leaves_torchs_generator_alone(agent_class):
    before, draws = torch.get_rng_state(), []
    a, b, c = (small(agent_class, seed) for seed in (5, 5, 6))
    for agent in (a, b, c):
        agent.learn(24)
        draws.append(agent.predict(np.zeros((50, 2), np.float32), deterministic=False))
    assert torch.equal(before, torch.get_rng_state())
    assert same(a.state_dict(), b.state_dict()) and not torch.equal(a.actor[0].weight, c.actor[0].weight)
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_predict_takes_the_most_probable_option_or_samples():
    agent, obs = zeroed(PPO, (2, 4, 1), seed=3), np.zeros((20000, 2), np.float32)
    agent.actor[-1].bias.data = torch.tensor([0.3, 0.7, 0.1, 0.5, 0.4, 1e-9, 1.0]).log()
    greedy, draws = agent.predict(obs[:3]), agent.predict(obs, deterministic=False)
    assert greedy.dtype == draws.dtype == np.int64 and greedy.tolist() == [[1, 1, 0]] * 3
    # five standard errors of a frequency are at most 5 sqrt(0.25 / 20000) = 0.0177
    assert np.bincount(draws[:, 0]) / 20000 == pytest.approx([0.3, 0.7], abs=0.0177)
    assert np.bincount(draws[:, 1], minlength=4) / 20000 == pytest.approx([0.1, 0.5, 0.4, 0.0], abs=0.0177)
    assert not draws[:, 2].any()
    # heads are independent: P(both 1) = 0.35
    assert (draws[:, :2] == 1).all(axis=1).mean() == pytest.approx(0.35, abs=0.0177)


def test_standardised_rewards_teach_the_same_whatever_their_scale():
    torch.manual_seed(0)
    rollout = torch.randn(5, 2, 2), torch.zeros(4, 2, 2, dtype=torch.int64), torch.randn(4, 2), torch.zeros(4, 2) > 0
    plain, shifted, raw = (small(A2C, seed=1, standardize=value) for value in (1.0, 1.0, 0.0))
    for agent, factor in ((plain, 1.0), (shifted, 100.0), (raw, 100.0)):
        agent.update(rollout[0], rollout[1], factor * rollout[2] + 30 * (factor > 1), rollout[3])
    weights, other, of_raw = (agent.critic[0].weight.detach() for agent in (plain, shifted, raw))
    assert torch.allclose(weights, other, atol=1e-5) and not torch.allclose(weights, of_raw, atol=1e-5)


def test_the_four_columns_and_no_other_hyperparameters():
    assert PPO(Taped(), (2,)).hyper == rl.LLA_PPO and A2C(Taped(), (2,)).hyper == rl.LLA_A2C
    rest = {"gamma": 0.99, "value_coef": 0.5, "entropy_coef": 0.01, "max_grad_norm": 0.5, "standardize": 0.0}
    ppo = {**rest, "lam": 0.95, "minibatch": 32, "epochs": 10, "clip": 0.2}
    assert rl.LLA_PPO == {**ppo, "lr": 3e-4, "n_steps": 128} and rl.HLA_PPO == {**ppo, "lr": 1e-4, "n_steps": 64}
    a2c = {**rest, "lam": 1.0, "n_steps": 64}
    assert rl.LLA_A2C == {**a2c, "lr": 7e-4} and rl.HLA_A2C == {**a2c, "lr": 3e-4}
    with pytest.raises(TypeError, match="PPO has no rate; it has lr, n_steps"):
        small(PPO, rate=0.1)


def test_learn_counts_steps_exactly_and_starts_with_a_reset():
    agent = small(PPO)  # two environments, rollouts of four steps
    rollouts = taped_rollouts(agent)
    first = agent.learn(21)  # 11 steps each: 4 + 4 + 3
    assert agent.env.calls == ["reset"] + ["step"] * 11
    assert [len(actions) for _, actions, _, _ in rollouts] == [4, 4, 3]
    assert [u["timesteps"] for u in first] == [8, 16, 22]
    second = agent.learn(2)  # one step each
    assert agent.env.calls[12:] == ["reset", "step"]
    assert [u["timesteps"] for u in second] == [24] and agent.timesteps == 24
    assert all(type(value) is float for update in first for key, value in update.items() if key != "timesteps")


def test_rollouts_hold_what_the_environment_said():
    agent = small(A2C)
    rollouts = taped_rollouts(agent)
    agent.learn(16)
    # Episodes of three steps; environment 1 starts at its second step. What follows an end is step 0 of the next
    # episode, and the last observation of a rollout is the first of the next one.
    clock = [[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]]
    assert rollouts[0][0][..., 0].tolist() == clock[:5]
    assert rollouts[1][0][..., 0].tolist() == clock[4:]
    assert rollouts[0][0][..., 1].tolist() == [[0, 1]] * 5
    for observations, actions, rewards, dones in rollouts:
        assert torch.equal(dones, observations[:-1, :, 0] == 2)
        torch.testing.assert_close(rewards, (actions.sum(dim=2) * 0.1 + observations[:-1, :, 0]).float())
    assert list(agent.recent_rewards) == torch.cat([rewards for _, _, rewards, _ in rollouts]).flatten().tolist()
    agent.learn(200)
    assert len(agent.recent_rewards) == 100


@both
def test_training_goes_on_bit_for_bit_after_loading(agent_class):
    agent, loaded = small(agent_class, seed=1), small(agent_class, seed=2)
    agent.learn(60)
    state = agent.state_dict()
    loaded.load_state_dict(through_a_file(state))
    went_on = agent.learn(60)
    assert same(loaded.state_dict(), state)  # and the agent's training since has not changed `state`
    assert loaded.learn(60) == went_on
    assert same(agent.state_dict(), loaded.state_dict()) and not same(agent.state_dict(), state)


@pytest.mark.parametrize("what, biases, observed, reward", [
    ("an observation of the environment", (0.0, 0.0), math.inf, 1.0),
    ("a reward of the environment", (0.0, 0.0), 1.0, math.nan),
    ("the loss", (0.0, 1e30), 1.0, 1.0),  # the squared error overflows
    # The squared error is 1e38; 65 gradients of about 1e19 have squares beyond 3.4e38.
    ("the norm of the gradients", (10.0, 1e19), 1.0, 1.0)])
def test_what_is_not_finite_is_named_and_no_step_is_made(what, biases, observed, reward):
    agent = PPO(Taped(), (2,), name="block 3")
    for layer, bias in zip((2, 4), biases):
        agent.critic[layer].bias.data.fill_(bias)
    observations, actions, rewards, dones = one_step([0, 1], [1.0, reward])
    before = agent.state_dict()
    with pytest.raises(FloatingPointError, match=f"^block 3: {what} is not finite"):
        agent.update(observations * observed, actions, rewards, dones)
    assert all(same(before[part], agent.state_dict()[part]) for part in ("actor", "critic", "optimizer"))


class FirstActionCounts:
    """Episodes of five steps whose reward comes at the end: the share of right choices in the *first* action, which is
    credited only through the values and returns of the four steps after it, and with gamma = 0 not at all."""

    nvec, right, num_envs = (3, 2, 4), np.array([2, 0, 3]), 8  # no obs_dim: a reset tells it

    def reset(self):
        self.t = 0
        return np.eye(5)[[0] * 8]

    def step(self, actions):
        if self.t == 0:
            self.score = (actions == self.right).mean(axis=1)
        self.t = (self.t + 1) % 5
        return np.eye(5)[[self.t] * 8], self.score * (self.t == 0), np.full(8, self.t == 0), {}

    def mean_return(self, agent):
        """Of the stochastic policy, from 4,000 draws (standard error below 0.005)."""
        return (agent.predict(np.eye(5)[[0] * 4000], deterministic=False) == self.right).mean()


@pytest.mark.parametrize("agent_class, timesteps, hyper", [
    (PPO, 3840, {"n_steps": 32, "minibatch": 128, "lr": 1e-3}), (A2C, 12800, {"n_steps": 16})])
def test_learns_what_pays_five_steps_later(agent_class, timesteps, hyper):
    agents = [agent_class(FirstActionCounts(), FirstActionCounts.nvec, seed=seed, **hyper, **more)
              for more in ({}, {"gamma": 0.0}) for seed in range(2)]
    assert all(agent.env.mean_return(agent) < 0.45 for agent in agents)  # chance is (1/3 + 1/2 + 1/4) / 3 = 0.36
    for agent in agents:
        agent.learn(timesteps)
    assert all(agent.env.mean_return(agent) >= 0.95 for agent in agents[:2])  # the best policy returns 1
    assert all(agent.env.mean_return(agent) < 0.6 for agent in agents[2:])  # blind to what comes later
