"""train.py: Fisher against hand numbers and per-sample gradients, the training loop step by step on tiny networks."""

import dataclasses
import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import models
from compress import BlockConfig, Grid, KernelConfig, NetworkConfig, compress_network, kernel_shapes
from config import Config
from deploy.qat import GridTraining
from networks import equal, seeded, snapshot
from support.networks import switches
from train import Epoch, Recipe, Trainer, block_fisher, correct, fisher_sensitivity


class Points:
    """A set of images made of any tensors; shuffled by a generator, never augmented."""

    def __init__(self, x, y):
        self.x, self.y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)

    def __len__(self):
        return len(self.x)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in (order[:limit] if limit else order).split(batch_size):
            yield self.x[index], self.y[index]


class Script(Points):
    """Ten test images at x = 1 of which `hits[k]` are of class 0 in the k-th evaluation."""

    def __init__(self, hits):
        super().__init__(torch.ones(10, 1), [0] * 10)
        self.hits = iter(hits)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        assert generator is None, "the test split is neither shuffled nor augmented"
        yield self.x, (torch.arange(10) >= next(self.hits)).long()


class Slope(nn.Module):
    """One parameter: logits (w x, 0). With x = 1 of class 0 every step raises w, and class 0 is predicted."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, x):
        return torch.cat([self.w * x, 0 * x], dim=1)


class Modes(Slope):
    """Slope with BatchNorm that writes down, per forward pass, whether it trains and has gradients."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(1), []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return super().forward(self.norm(x) + x)


ONES = Points(torch.ones(6, 1), [0] * 6)


def trainer(model, train=ONES, test=None, epochs=4, lr=0.1, decay=0.01, patience=0, warmup=0.0, name="", **more):
    return Trainer(model, train, test or Script([5] * 20), Recipe(name, epochs, lr, decay, patience, warmup), **{
        "batch_size": 3, "eval_images": 10, "eval_batch_size": 10, "generator": seeded(), **more})


# Sensitivity (Eq. 14-15)

class Three(nn.Module):
    """Logits (a x + c, b x). The gradient of one image is (p0 - y0) times (x, -x, 1) for a, b, c."""

    def __init__(self, a=0.0, dropout=0.0):
        super().__init__()
        self.a, self.b, self.c, self.idle = (nn.Parameter(torch.tensor([v])) for v in (a, 0.0, 0.0, 1.0))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(torch.cat([self.a * x + self.c, self.b * x], dim=1))


def parts(*names):
    return [SimpleNamespace(parameters=tuple(group)) for group in names]


TWO = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])


def test_fisher_is_the_mean_of_squared_gradients_of_single_images():
    # p0 = 1/2. Image 1 (x = 1, class 0): gradients -1/2, 1/2, -1/2; image 2 (x = 2, class 1): 1, -1, 1/2.
    # Squares: (1/4 + 1)/2 for a and b, (1/4 + 1/4)/2 for c.
    assert block_fisher(Three(), parts("a", "b", "c"), *TWO) == [0.625, 0.625, 0.25]
    assert block_fisher(Three(), parts("ba", "c", ["idle"]), *TWO) == [1.25, 0.25, 0.0]  # each block's own parameters
    # a = ln 3, x = 1: p0 = 3/4. Class 0: (-1/4)^2; class 1: (3/4)^2; the mean is 10/32.
    values = block_fisher(Three(math.log(3)), parts("a", "b", "c"), torch.ones(2, 1), torch.tensor([0, 1]))
    assert values == pytest.approx([0.3125] * 3, rel=1e-6)


def test_sensitivity_is_divided_by_the_largest_and_not_the_square_of_the_mean_gradient():
    # Means of the gradients: 1/4, -1/4, 0; squared (what the authors' script takes, ledger D4) 1/16, 1/16, 0.
    model = Three()
    F.cross_entropy(model(TWO[0]), TWO[1]).backward()
    assert [p.grad.item() ** 2 for p in (model.a, model.b, model.c)] == [0.0625, 0.0625, 0.0]
    assert fisher_sensitivity(model, parts("a", "c"), *TWO) == [1.0, 0.4]  # the script's would be 1 and 0
    assert fisher_sensitivity(model, parts("c", "ab"), *TWO) == [0.2, 1.0]
    x = torch.zeros(2, 1)  # x = 0: only c has a gradient
    assert fisher_sensitivity(model, parts("a", "c"), x, TWO[1]) == [0.0, 1.0]
    assert fisher_sensitivity(model, parts("a", "b"), x, TWO[1]) == [1.0, 1.0]


@pytest.mark.parametrize("a, x", [(math.nan, 1.0), (math.inf, 1.0), (0.0, 1e30)])
def test_sensitivity_that_is_not_finite_is_an_error(a, x):
    class Square(Three):
        def forward(self, x):
            return torch.cat([self.a * x * x + self.c, self.b * x], dim=1)

    for order in (("c", "a"), ("a", "c")):  # gradients of a with x = 1e30 overflow; those of c do not
        with pytest.raises(FloatingPointError, match="Fisher"):
            fisher_sensitivity(Square(a), parts(*order), torch.full((2, 1), x), TWO[1])
    # gradients of 5e29 are finite, their squares are not in float32
    assert block_fisher(Three(), parts("a"), torch.full((2, 1), 1e30), TWO[1]) == [pytest.approx(2.5e59, rel=1e-5)]


def test_fisher_runs_in_eval_mode_also_on_frozen_parameters_and_leaves_them_so():
    model = Three(dropout=0.9)
    model.a.requires_grad_(False)
    for mode in (True, False):
        model.train(mode)
        assert block_fisher(model, parts("a", "c"), *TWO) == [0.625, 0.25]
        assert model.training is mode and model.dropout.training is mode
    assert not model.a.requires_grad and model.c.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "resnet18"])
def test_fisher_of_a_real_structure_agrees_with_per_sample_gradients(name):
    torch.manual_seed(0)
    model = models.build(name, 10, 32, 0.0417 if "deit" in name else 0.0625)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=seeded(1)))
    blocks, x, y = models.find_blocks(model), torch.randn(3, 3, 32, 32, generator=seeded(2)), torch.tensor([1, 4, 7])

    def loss(params, image, label):
        return F.cross_entropy(functional_call(model, params, (image[None],)), label[None])

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.eval().named_parameters()), x, y)
    wanted = [sum(found[key].double().square().sum().item() for key in block.parameters) / 3 for block in blocks]
    before = snapshot(model.train())
    assert block_fisher(model, blocks, x, y) == pytest.approx(wanted, rel=1e-3)
    assert equal(before, snapshot(model)) and model.training  # BatchNorm's statistics and counts included


def test_correct_is_in_stored_order_ends_at_the_limit_and_leaves_the_network_as_it_was():
    images, calls, model = Points([[1], [-1], [2], [-3], [4]], [0, 0, 1, 1, 0]), [], Modes()  # predicts 0 where x > 0
    before, hits = snapshot(model), [True, False, False, True, True]
    for limit, count in ((0, 5), (3, 3), (4, 4), (5, 5), (9, 5)):
        model.train(limit > 3)
        got = correct(model, images, 2, limit, lambda what, *counts: calls.append(counts))
        assert got.dtype == torch.bool and got.tolist() == hits[:count] and model.norm.training is (limit > 3)
    assert calls[:5] == [(2, 5), (4, 5), (5, 5), (2, 3), (3, 3)]
    assert set(model.seen) == {(False, False)} and equal(before, snapshot(model))


# Training: one step, and the learning rate
def test_two_steps_of_adamw_by_hand():
    # w = 0.5, lr 0.1, weight decay 0.2. Image (1, class 0): gradient -0.377541, so w becomes
    # 0.5 (1 - 0.02) + 0.1 = 0.59. Image (-2, class 0) in epoch 2, lr 0.05: gradient 1.529896; m = 0.118901,
    # v = 0.0024827 after bias correction 0.625797 and 1.241959, so w becomes
    # 0.59 (1 - 0.01) - 0.05 * 0.625797 / sqrt(1.241959) = 0.555999.
    model = Slope(0.5)
    t = trainer(model, Points([[1.0]], [0]), epochs=2, lr=0.1, decay=0.2, batch_size=1)
    t.run_epoch()
    assert model.w.item() == pytest.approx(0.59, abs=1e-6)
    t.train_set = Points([[-2.0]], [0])
    t.run_epoch()
    assert model.w.item() == pytest.approx(0.555999, abs=1e-6)
    # The mean loss: with lr 0, w = 0.5 it is ln(1 + e^-0.5) = 0.474077 for x = 1 and ln(1 + e^0.5) = 0.974077 for -1.
    t = trainer(Slope(0.5), Points([[1], [1], [-1], [1], [-1]], [0] * 5), lr=0.0)
    assert t.run_epoch().loss == pytest.approx((3 * 0.474077 + 2 * 0.974077) / 5, abs=1e-6)
    t = trainer(nn.Sequential(nn.Dropout(0.5), Slope()), lr=0.0)  # every epoch leaves out other inputs
    assert len({t.run_epoch().loss for _ in range(4)}) > 1


@pytest.mark.parametrize("warmup, epochs, rates", [
    (0.0, 4, [0.1, 0.1, 0.0853553, 0.0853553, 0.05, 0.05, 0.0146447, 0.0146447]),  # epoch by epoch
    # one epoch that rises from nearly 0, then half a cosine over two, step by step
    (1.0, 3, [0.001 / 1.01, 0.051 / 1.01, 0.1, 0.0853553, 0.05, 0.0146447])])
def test_the_rate_follows_the_cosine(warmup, epochs, rates):
    t, seen = trainer(Slope(), epochs=epochs, lr=0.1, warmup=warmup), []
    t.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    t.run()
    assert seen == pytest.approx(rates, abs=1e-7)
    assert [e.lr for e in t.history] == pytest.approx(rates[::2], abs=1e-7)
    recipe = Recipe("scratch.lr", 2, 1.0, 0.0, warmup_epochs=0.5)  # a part of an epoch
    assert [recipe.rate(*at) for at in ((0, 0.0), (0, 0.2), (0, 0.5), (1, 0.25), (1, 1.0))] == pytest.approx(
        [0.01 / 0.51, 0.21 / 0.51, 1, 0.5, 0], abs=1e-12)


# Training: modes, stopping, the best epoch
@pytest.mark.parametrize("patience, hits, epochs, best", [
    (2, [5, 7, 7, 6, 9, 9], 4, 2),      # an equal accuracy is not a better one
    (3, [5, 7, 7, 6, 7, 9], 5, 2), (1, [5, 5, 9], 2, 1),
    (2, [5, 4, 6, 5, 4, 9], 5, 3),      # a better epoch starts the count again
    (2, [5, 4, 6, 5, 7, 6], 6, 5),      # the epoch limit comes first
    (0, [5, 4, 3, 2, 1, 0], 6, 1)])     # no patience: never early
def test_patience_counts_epochs_without_a_better_accuracy(patience, hits, epochs, best):
    t = trainer(Slope(), test=Script(hits), epochs=6, patience=patience)
    result = t.run()
    assert [e.acc for e in t.history] == [10.0 * h for h in hits[:epochs]]
    assert result.epoch == best and result.acc == 10.0 * hits[best - 1]


def test_the_network_ends_at_the_first_of_the_best_epochs_with_its_statistics():  # and trains: ledger D20
    model, after = Modes().eval(), []
    t = trainer(model, Points(torch.randn(6, 1, generator=seeded(3)), [0] * 6), Script([3, 8, 8, 5]))
    while not t.finished:
        t.run_epoch()
        after.append(snapshot(model))
    # every epoch trains in train mode although each ends with an evaluation
    assert model.seen == [(True, True), (True, True), (False, False)] * 4 and after[3]["norm.num_batches_tracked"] == 8
    assert t.run() == t.best == t.history[1] and equal(snapshot(model), after[1]) and not model.norm.training
    assert not any(torch.equal(after[1]["norm.running_mean"], after[n]["norm.running_mean"]) for n in (0, 2, 3))


def test_the_last_epoch_is_kept_where_it_is_asked_for():
    model = nn.Linear(1, 2)
    run = trainer(model, test=Script([5, 9, 2]), epochs=3, patience=1)
    run.recipe = dataclasses.replace(run.recipe, keep="last")
    assert run.run().epoch == 3 and len(run.history) == 3  # patience has nothing to wait for
    assert all(torch.equal(value, run.best_state[key]) for key, value in model.state_dict().items())


def test_the_state_before_training_is_no_candidate_and_only_the_first_images_choose():
    # w = 0.5 scores 100 % on x > 0; one step of rate 1 on mislabelled images makes w negative and the accuracy 0.
    model, test, lines, calls = Slope(0.5), Points(torch.ones(10, 1), [0] * 4 + [1] * 6), [], []
    best = trainer(model, Points(torch.ones(3, 1), [1] * 3), test, epochs=2, lr=1.0, eval_images=4).run()
    assert best.acc == 0.0 and model.w.item() < 0
    t = trainer(Slope(), test=test, epochs=2, eval_images=5, eval_batch_size=2)
    assert t.run(lambda *call: calls.append(call[1:]), "cycle 2, fine-tuning", lines.append).acc == 80.0
    assert len(lines) == 2 and "cycle 2, fine-tuning: epoch 2" in lines[1] and "80.00" in lines[1]
    assert calls == [(1, 2), (2, 2)] * 2


def test_in_half_precision_the_forward_pass_alone_is_bfloat16():
    seen, model, loss = [], nn.Sequential(nn.Linear(1, 2, bias=False)), F.cross_entropy
    model[0].register_forward_hook(lambda module, x, y: seen.append((y.dtype, module.training)))
    best = trainer(model, epochs=1, half=True, loss=lambda z, y, x: seen.append(z.dtype) or loss(z, y)).run()
    assert seen == [(torch.bfloat16, True), torch.float32] * 2 + [(torch.float32, False)]
    assert math.isfinite(best.loss) and model[0].weight.dtype == model[0].weight.grad.dtype == torch.float32
    with switches(Config()):  # in which autocast may not keep the weights of the first step
        run = trainer(nn.Linear(1, 2), epochs=3, lr=1.0, half=True)
        run.run()
    assert run.history[0].loss > 1.5 * run.history[2].loss


# Training: masks, single images, errors
def test_pruned_rows_are_zero_after_every_step_with_momentum_and_weight_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))  # nothing between them: the pruned row has gradients
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.7, -0.2]]))
    sets = (Points(torch.randn(n, 2, generator=seeded(n)), torch.arange(n) % 2) for n in (8, 5))
    t = trainer(model, *sets, batch_size=2, epochs=3, decay=0.5, masks={"0": torch.tensor([True, False, True])},
                blocks=[SimpleNamespace(kernels={"0": model[0]})])
    before, pulled, seen = snapshot(model), [], []
    model[0].weight.register_hook(lambda gradient: pulled.append(gradient[1].abs().sum().item()))
    model.register_forward_pre_hook(lambda *_: seen.append(model[0].weight[1].abs().sum().item()))
    t.run()
    assert len(pulled) == 12 and all(value > 0.001 for value in pulled)  # every batch would move the row …
    assert len(seen) == 12 + 3 and not any(seen) and not t.best_state["0.weight"][1].any()  # … and nothing ever did
    moments = t.optimizer.state[model[0].weight]
    assert not any(moments[key][1].any() for key in ("exp_avg", "exp_avg_sq")) and moments["exp_avg"][0].all()
    # ledger D13: a weight that is zero without being pruned is trained, and so is the bias of a pruned row
    moved = model[0].weight != before["0.weight"]
    assert moved.tolist() == [[True, True], [False, False], [True, True]]
    assert (model[0].bias != before["0.bias"]).all() and (model[1].weight != before["1.weight"]).all()


@pytest.mark.parametrize("images, batch_size, steps", [(7, 3, 2), (1, 64, 1), (5, 1, 5)])
def test_a_last_batch_of_one_image_is_left_out_where_batches_are_larger(images, batch_size, steps):
    t, taken = trainer(Slope(), Points(torch.ones(images, 1), [0] * images), epochs=1, batch_size=batch_size), []
    t.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    assert math.isfinite(t.run().loss) and len(taken) == steps


@pytest.mark.parametrize("bad", [math.nan, -3e38])  # the second times 9 is -inf, and the loss +inf
def test_a_loss_that_is_not_finite_names_phase_and_setting(bad):
    t = trainer(Slope(9.0), name="finetune.lr")
    t.run_epoch(what="cycle 2, fine-tuning")
    t.train_set = Points([[1.0], [bad], [1.0]], [0, 0, 0])
    with pytest.raises(FloatingPointError, match=r"cycle 2, fine-tuning.*epoch 2.*lower finetune.lr \(0.1\)"):
        t.run_epoch(what="cycle 2, fine-tuning")
    assert len(t.history) == 1
    pytest.raises(FloatingPointError, trainer(Slope(math.nan)).run_epoch).match("before the first step")


# Going on
class Checkpoint:
    """Keeps what a training saves as a file would, and breaks it off after ``left`` epochs."""
    file, left = None, 99

    def load(self):
        with torch.serialization.safe_globals([Epoch, Grid]):
            return self.file and torch.load(io.BytesIO(self.file), weights_only=True)

    def save(self, state):
        torch.save(state, buffer := io.BytesIO())
        self.file, self.left = buffer.getvalue(), self.left - 1
        if not self.left:
            raise KeyboardInterrupt


def resnet_trainer(qat):
    """A narrow ResNet18 with pruned channels, in training on the grid or not."""
    torch.manual_seed(0)
    model = models.build("resnet18", 3, 12, 0.0625)
    blocks, splits = models.find_blocks(model), data.synthetic(3, 40, 24, 12, 0)
    config = NetworkConfig(tuple(BlockConfig((KernelConfig(4, 0.5),) * len(b.kernels), kernel_shapes(b))
                                 for b in blocks))
    masks = compress_network(blocks, config)
    on_grid = GridTraining(blocks, config, masks) if qat else None
    return model, trainer(model, *splits, 4, 0.01, 0.1, batch_size=16, eval_images=24, blocks=blocks, masks=masks,
                          on_grid=on_grid)


@pytest.mark.parametrize("qat, stops", [(False, (1, 2)), (False, (3,)), (True, (2,)), (True, (1, 1))])
def test_a_training_that_was_cut_ends_as_one_that_was_not(qat, stops):
    whole_model, whole = resnet_trainer(qat)
    whole.run(checkpoint=Checkpoint())
    checkpoint = Checkpoint()
    for checkpoint.left in stops:
        with pytest.raises(KeyboardInterrupt):
            resnet_trainer(qat)[1].run(checkpoint=checkpoint)
    (model, last), checkpoint.left = resnet_trainer(qat), 99
    torch.manual_seed(99)  # the trainer's generator alone decides
    nn.init.ones_(model.conv1.weight)
    assert last.run(checkpoint=checkpoint) == whole.best and last.history == whole.history and len(whole.history) == 4
    assert equal(snapshot(model), snapshot(whole_model))
    if qat:
        assert all(torch.equal(last.best_grids[k].scale, g.scale) for k, g in whole.best_grids.items())
        for weights, scales in (whole.optimizer.param_groups, last.optimizer.param_groups):
            assert (scales["lr"], scales["weight_decay"]) == (20 * weights["lr"], 0) and weights["lr"]
