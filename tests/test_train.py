"""train.py: Fisher against hand numbers and vmapped gradients, the training loop step by step on tiny networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import models
from models import Block
from train import Epoch, Trainer, accuracy, block_fisher, correct, fisher_sensitivity


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Points:
    """A set of images made of any tensors; shuffled by a generator like data.Images, never augmented."""

    def __init__(self, x, y):
        self.x, self.y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)

    def __len__(self):
        return len(self.x)

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in (order[:limit] if limit else order).split(batch_size):
            yield self.x[index], self.y[index]


class Script:
    """Ten test images at x = 1 of which `hits[k]` are of class 0 in the k-th evaluation."""

    def __init__(self, hits):
        self.hits, self.evaluations = list(hits), 0

    def __len__(self):
        return 10

    def batches(self, batch_size, device="cpu", generator=None, limit=0):
        assert generator is None, "the test split is neither shuffled nor augmented"
        hits = self.hits[self.evaluations]
        self.evaluations += 1
        yield torch.ones(10, 1), torch.tensor([0] * hits + [1] * (10 - hits))


class Slope(nn.Module):
    """One parameter: logits (w x, 0). With x = 1 of class 0 every step raises w, and class 0 is predicted."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, x):
        return torch.cat([self.w * x, 0 * x], dim=1)


class Modes(nn.Module):
    """Slope that writes down, per forward pass, whether it trains."""

    def __init__(self):
        super().__init__()
        self.slope, self.norm, self.seen = Slope(), nn.BatchNorm1d(1), []

    def forward(self, x):
        self.seen.append(self.training)
        return self.slope(self.norm(x) + x)


ONES = Points(torch.ones(6, 1), [0] * 6)


def trainer(model, train=ONES, test=None, **changes):
    settings = dict(epochs=4, lr=0.1, weight_decay=0.01, patience=0, batch_size=3, eval_images=10,
                    eval_batch_size=10, generator=seeded())
    return Trainer(model, train, test or Script([5] * 20), **{**settings, **changes})


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# Sensitivity (Eq. 14-15)


class Three(nn.Module):
    """Three parameters: logits (a x + c, b x). The gradient of one image is (p0 - y0) times (x, -x, 1) for a, b, c."""

    def __init__(self, a=0.0, b=0.0, c=0.0, dropout=0.0):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor([v])) for v in (a, b, c))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(torch.cat([self.a * x + self.c, self.b * x], dim=1))


def parts(*names):
    return [Block(f"block{i}", {}, tuple(group)) for i, group in enumerate(names)]


TWO = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])


def test_fisher_is_the_mean_of_squared_gradients_of_single_images():
    # p0 = 1/2. Image 1 (x = 1, class 0): gradients -1/2, 1/2, -1/2; image 2 (x = 2, class 1): 1, -1, 1/2.
    # Squares: (1/4 + 1)/2 for a and b, (1/4 + 1/4)/2 for c.
    assert block_fisher(Three(), parts("a", "b", "c"), *TWO) == [0.625, 0.625, 0.25]


def test_fisher_is_not_the_square_of_the_mean_gradient():
    # Means of the gradients: 1/4, -1/4, 0; squared (what the authors' script takes, ledger D4) 1/16, 1/16, 0.
    model = Three()
    F.cross_entropy(model(TWO[0]), TWO[1]).backward()
    assert [p.grad.item() ** 2 for p in (model.a, model.b, model.c)] == [0.0625, 0.0625, 0.0]
    assert block_fisher(model, parts("a", "b", "c"), *TWO) == [0.625, 0.625, 0.25]
    assert fisher_sensitivity(model, parts("a", "c"), *TWO) == [1.0, 0.4]  # the script's would be 1 and 0


def test_fisher_with_a_confident_network_by_hand():
    # a = ln 3, x = 1: p0 = 3/4. Class 0: (-1/4)^2; class 1: (3/4)^2; the mean is 10/32.
    values = block_fisher(Three(a=math.log(3)), parts("a", "b", "c"), torch.ones(2, 1), torch.tensor([0, 1]))
    assert values == pytest.approx([0.3125, 0.3125, 0.3125], rel=1e-6)


def test_a_block_sums_over_its_own_parameters_only():
    assert block_fisher(Three(), parts("a", "bc"), *TWO) == [0.625, 0.875]
    assert block_fisher(Three(), parts("c"), *TWO) == [0.25]
    assert block_fisher(Three(), parts("ba", "c"), *TWO) == [1.25, 0.25]


def test_sensitivity_is_divided_by_the_largest_block():
    assert fisher_sensitivity(Three(), parts("c", "ab"), *TWO) == [0.2, 1.0]
    assert fisher_sensitivity(Three(), parts("a", "b", "c"), *TWO) == [1.0, 1.0, 0.4]


def test_sensitivity_does_not_depend_on_the_number_of_images():
    once = block_fisher(Three(), parts("a", "c"), *TWO)
    twice = block_fisher(Three(), parts("a", "c"), TWO[0].repeat(2, 1), TWO[1].repeat(2))
    assert once == twice == [0.625, 0.25]


def test_a_block_without_information_is_zero_and_all_of_them_are_ones():
    x, y = torch.zeros(2, 1), torch.tensor([0, 1])  # x = 0: only c has a gradient
    assert fisher_sensitivity(Three(), parts("a", "c"), x, y) == [0.0, 1.0]
    assert fisher_sensitivity(Three(), parts("a", "b"), x, y) == [1.0, 1.0]


def test_a_parameter_that_the_loss_does_not_use_counts_nothing():
    model = Three()
    model.idle = nn.Parameter(torch.ones(5))
    assert block_fisher(model, parts(["idle"], ["idle", "c"]), *TWO) == [0.0, 0.25]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_sensitivity_that_is_not_finite_is_an_error(broken):
    with pytest.raises(FloatingPointError, match="Fisher"):
        fisher_sensitivity(Three(c=broken), parts("a", "b"), *TWO)


def test_one_block_that_overflows_is_an_error_even_beside_finite_ones():
    class Square(Three):
        def forward(self, x):
            return torch.cat([self.a * x * x + self.c, self.b * x], dim=1)

    x, y = torch.tensor([[1e30], [1e30]]), torch.tensor([0, 1])  # gradients of a 1e60: infinite in float32
    assert block_fisher(Square(), parts("c", "a"), x, y) == [0.25, math.inf]
    for order in (("c", "a"), ("a", "c")):
        with pytest.raises(FloatingPointError):
            fisher_sensitivity(Square(), parts(*order), x, y)


def test_one_block_without_a_number_is_an_error_wherever_it_stands():
    class Vanishing(Three):
        def forward(self, x):
            return torch.cat([self.a * (0 * x) * x * x + self.c, self.b * x], dim=1)

    x, y = torch.tensor([[1e30], [1e30]]), torch.tensor([0, 1])  # backwards, a's gradient is infinity times 0
    first, second = block_fisher(Vanishing(), parts("c", "a"), x, y)
    assert first == 0.25 and math.isnan(second)
    for order in (("c", "a"), ("a", "c")):  # max() of 0.25 and NaN is whichever comes first
        with pytest.raises(FloatingPointError):
            fisher_sensitivity(Vanishing(), parts(*order), x, y)


def test_large_gradients_are_squared_without_overflow():
    x, y = torch.tensor([[1e30], [1e30]]), torch.tensor([0, 1])  # gradients 5e29: finite, their squares not in float32
    assert block_fisher(Three(), parts("a"), x, y) == [pytest.approx(2.5e59, rel=1e-5)]
    assert fisher_sensitivity(Three(), parts("a", "ab"), x, y) == [pytest.approx(0.5), 1.0]


def test_fisher_runs_in_eval_mode_and_restores_the_mode():
    model = Three(dropout=0.9)
    for mode in (True, False):
        model.train(mode)
        assert block_fisher(model, parts("a", "c"), *TWO) == [0.625, 0.25]
        assert model.training is mode and model.dropout.training is mode


def test_fisher_of_frozen_parameters_counts_and_they_stay_frozen():
    model = Three()
    model.a.requires_grad_(False)
    assert block_fisher(model, parts("a", "c"), *TWO) == [0.625, 0.25]
    assert [p.requires_grad for p in (model.a, model.b, model.c)] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())


class Convs(nn.Module):
    """Two convolutions, each with BatchNorm; the second block is one without bias."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def convs(seed=0):
    """Convs whose BatchNorm statistics are not those of the images."""
    torch.manual_seed(seed)
    model = Convs()
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_(generator=seeded(seed))
        norm.running_var.uniform_(0.5, 2, generator=seeded(seed))
    return model


def conv_blocks(model):
    return [Block("one", {"conv1": model.conv1}, ("conv1.weight", "conv1.bias")),
            Block("two", {"conv2": model.conv2}, ("conv2.weight",))]


def vmapped_fisher(model, blocks, x, y):
    """Per-sample gradients of all images at once, in eval mode."""
    model.eval()
    everything = dict(model.named_buffers())

    def loss(params, image, label):
        return F.cross_entropy(functional_call(model, {**everything, **params}, (image[None],)), label[None])

    params = {name: p.detach() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return [sum(gradients[name].double().square().sum().item() for name in b.parameters) / len(x) for b in blocks]


def test_fisher_of_a_network_with_batchnorm_agrees_with_vmapped_gradients():
    model = convs()
    blocks, x, y = conv_blocks(model), torch.randn(6, 3, 8, 8, generator=seeded(1)), torch.arange(6) % 3
    wanted = vmapped_fisher(model, blocks, x, y)
    model.train()
    before = snapshot(model)
    assert block_fisher(model, blocks, x, y) == pytest.approx(wanted, rel=1e-4)
    assert same(before, snapshot(model))  # running statistics and the count of batches included
    assert model.bn1.training


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "resnet18"])
def test_fisher_of_a_real_structure_agrees_with_vmapped_gradients(name):
    torch.manual_seed(0)
    model = models.build(name, 10, 32, 0.0417 if "deit" in name else 0.0625)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=seeded(1)))
    blocks, x, y = models.find_blocks(model), torch.randn(3, 3, 32, 32, generator=seeded(2)), torch.tensor([1, 4, 7])
    assert block_fisher(model, blocks, x, y) == pytest.approx(vmapped_fisher(model, blocks, x, y), rel=1e-3)
    assert max(fisher_sensitivity(model, blocks, x, y)) == 1.0


# Evaluation


def test_correct_is_in_stored_order_and_ends_at_the_limit():
    images = Points([[1], [-1], [2], [-3], [4]], [0, 0, 1, 1, 0])  # Slope predicts 0 where x > 0
    hits = [True, False, False, True, True]
    for limit, count in ((0, 5), (3, 3), (4, 4), (5, 5), (9, 5)):
        got = correct(Slope(), images, batch_size=2, limit=limit)
        assert got.dtype == torch.bool and got.tolist() == hits[:count]


def test_correct_reports_progress_up_to_the_limit():
    calls = []
    images = Points(torch.ones(5, 1), [0] * 5)
    correct(Slope(), images, 2, progress=lambda *call: calls.append(call))
    correct(Slope(), images, 2, 3, progress=lambda *call: calls.append(call))
    assert [call[1:] for call in calls] == [(2, 5), (4, 5), (5, 5), (2, 3), (3, 3)]


def test_correct_uses_eval_mode_and_restores_the_mode():
    class Normed(nn.Module):
        """Predicts 0 where the normalised x is above 1: none of a batch's own, all of 3, 4, 5 as they are."""

        def __init__(self):
            super().__init__()
            self.norm, self.modes = nn.BatchNorm1d(1), []

        def forward(self, x):
            self.modes.append((self.training, torch.is_grad_enabled()))
            return torch.cat([self.norm(x) - 2, torch.zeros_like(x)], dim=1)

    model = Normed()
    images, before = Points([[3], [4], [5]], [0, 0, 0]), snapshot(model)
    for mode in (True, False):
        model.train(mode)
        assert correct(model, images, 3).tolist() == [True] * 3
        assert model.training is mode and model.norm.training is mode
    assert model.modes == [(False, False)] * 2
    assert same(before, snapshot(model))


def test_accuracy_is_in_percentage_points():
    assert accuracy(torch.tensor([True, False, False])) == pytest.approx(33.333333)
    assert accuracy(torch.tensor([True] * 1112 + [False] * 168)) == 86.875
    assert type(accuracy(torch.tensor([True]))) is float


# Training: one step, and the learning rate


def test_two_steps_of_adamw_by_hand():
    # w = 0.5, lr 0.1, weight decay 0.2. Image (1, class 0): gradient -0.377541, so w becomes
    # 0.5 (1 - 0.02) + 0.1 = 0.59. Image (-2, class 0) in epoch 2, lr 0.05: gradient 1.529896; m = 0.118901,
    # v = 0.0024827 after bias correction 0.625797 and 1.241959, so w becomes
    # 0.59 (1 - 0.01) - 0.05 * 0.625797 / sqrt(1.241959) = 0.555999.
    model = Slope(0.5)
    images = Points([[1.0]], [0])
    t = trainer(model, images, epochs=2, lr=0.1, weight_decay=0.2, batch_size=1)
    t.run_epoch()
    assert model.w.item() == pytest.approx(0.59, abs=1e-6)
    t.train_set = Points([[-2.0]], [0])
    t.run_epoch()
    assert model.w.item() == pytest.approx(0.555999, abs=1e-6)


def test_the_loss_of_an_epoch_is_the_mean_over_images():
    # With lr 0, w = 0.5: losses ln(1 + e^-0.5) = 0.474077 for x = 1 and ln(1 + e^0.5) = 0.974077 for x = -1.
    images = Points([[1], [1], [-1], [1], [-1]], [0] * 5)
    t = trainer(Slope(0.5), images, lr=0.0, batch_size=3)
    assert t.run_epoch().loss == pytest.approx((3 * 0.474077 + 2 * 0.974077) / 5, abs=1e-6)


def rates_of(t):
    """Learning rate at every optimiser step of a whole run."""
    seen = []
    t.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    t.run()
    return seen


def test_the_rate_follows_the_cosine_epoch_by_epoch():
    t = trainer(Slope(), epochs=4, lr=0.1)
    by_epoch = [0.1, 0.0853553, 0.05, 0.0146447]
    assert rates_of(t) == pytest.approx([lr for lr in by_epoch for _ in range(2)], abs=1e-7)
    assert [e.lr for e in t.history] == pytest.approx(by_epoch, abs=1e-7)
    assert [e.epoch for e in t.history] == [1, 2, 3, 4]


def test_the_warm_up_rises_step_by_step_and_the_cosine_falls_step_by_step():
    # Six images in batches of three: steps at 0, 0.5, … epochs. Warm-up of one epoch, then half a cosine over two.
    seen = rates_of(trainer(Slope(), epochs=3, lr=1.0, warmup_epochs=1.0))
    assert 0 < seen[0] < 0.02
    assert seen[1] == pytest.approx(0.5, abs=0.01)
    assert seen[2:] == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_the_warm_up_is_linear_and_may_be_part_of_an_epoch():
    t = trainer(Slope(), epochs=2, lr=1.0, warmup_epochs=0.5)
    low, middle, high = (t.rate(0, fraction) for fraction in (0.0, 0.2, 0.4))
    assert 0 < low < middle and high - middle == pytest.approx(middle - low)
    assert t.rate(0, 0.5) == 1.0
    assert t.rate(1, 0.25) == pytest.approx(0.5)  # half of the remaining 1.5 epochs
    assert t.rate(1, 1.0) == pytest.approx(0.0, abs=1e-12)


# Training: modes, stopping, the best epoch


def test_every_epoch_trains_in_train_mode_although_each_ends_with_an_evaluation():
    model = Modes()
    model.eval()
    t = trainer(model, test=Script([5, 6, 7]), epochs=3)
    t.run()
    assert model.seen == [True, True, False] * 3
    assert model.norm.num_batches_tracked.item() == 6  # BatchNorm followed the batches of every epoch
    assert not model.training and not model.norm.training


@pytest.mark.parametrize("patience, hits, epochs, best", [
    (2, [5, 7, 7, 6, 9, 9], 4, 2),      # an equal accuracy is not a better one
    (3, [5, 7, 7, 6, 7, 9], 5, 2),
    (1, [5, 5, 9], 2, 1),
    (2, [5, 4, 6, 5, 4, 9], 5, 3),      # a better epoch starts the count again
    (2, [5, 4, 6, 5, 7, 6], 6, 5),      # the epoch limit comes first
    (0, [5, 4, 3, 2, 1, 0], 6, 1),      # no patience given: never early
    (6, [5, 4, 3, 2, 1, 0], 6, 1)])
def test_patience_counts_epochs_without_a_better_accuracy(patience, hits, epochs, best):
    test = Script(hits)
    t = trainer(Slope(), test=test, epochs=6, patience=patience)
    result = t.run()
    assert [e.acc for e in t.history] == [10.0 * h for h in hits[:epochs]]
    assert test.evaluations == epochs
    assert result.epoch == best and result.acc == 10.0 * hits[best - 1]


def test_the_network_ends_at_the_first_of_the_best_epochs_with_its_statistics():
    model, after = Modes(), []
    t = trainer(model, Points(torch.randn(6, 1, generator=seeded(3)), [0] * 6), Script([3, 8, 8, 5]))
    while not t.finished:
        t.run_epoch()
        after.append(snapshot(model))
    t.run()
    assert same(snapshot(model), after[1])
    assert not any(same(after[1], other) for other in (after[0], after[2], after[3]))
    assert not torch.equal(after[1]["norm.running_mean"], after[3]["norm.running_mean"])
    assert t.best == t.history[1]


def test_the_state_before_training_is_no_candidate():
    # w = 0.5 scores 100 % on x > 0; one step of rate 1 on mislabelled images makes w negative and the accuracy 0.
    model = Slope(0.5)
    test = Points(torch.ones(4, 1), [0] * 4)
    assert accuracy(correct(model, test)) == 100.0
    best = trainer(model, Points(torch.ones(3, 1), [1] * 3), test, epochs=2, lr=1.0, eval_images=4).run()
    assert best.acc == 0.0
    assert model.w.item() < 0


def test_only_the_first_evaluation_images_choose_the_epoch():
    test = Points(torch.ones(10, 1), [0] * 4 + [1] * 6)
    assert trainer(Slope(), test=test, epochs=1, eval_images=5, eval_batch_size=2).run().acc == 80.0
    assert trainer(Slope(), test=test, epochs=1, eval_images=10).run().acc == 40.0


def test_run_logs_one_line_per_epoch_and_progress_counts_steps():
    lines, calls = [], []
    trainer(Slope(), epochs=2).run(lambda *call: calls.append(call), "cycle 2, fine-tuning", lines.append)
    assert len(lines) == 2 and all("cycle 2, fine-tuning" in line for line in lines)
    assert "epoch 2" in lines[1] and "50.00" in lines[1]
    assert [call[1:] for call in calls] == [(1, 2), (2, 2)] * 2


# Training: masks


class TwoLayers(nn.Module):
    """Linear kernel [3, 2] without a non-linearity after it, so that pruned rows have gradients; then a head."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(2, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.7, -0.2]]))
            self.head.weight.copy_(torch.tensor([[1.0, 2.0, -1.0], [-1.0, 0.5, 1.0]]))

    def forward(self, x):
        return self.head(self.fc(x))


def masked_trainer(mask=(True, False, True), **changes):
    model = TwoLayers()
    blocks = [Block("group0", {"fc": model.fc}, ("fc.weight", "fc.bias"))]
    images = Points(torch.randn(8, 2, generator=seeded(4)), [0, 1] * 4)
    test = Points(torch.randn(5, 2, generator=seeded(5)), [0, 1, 0, 1, 0])
    t = trainer(model, images, test, blocks=blocks, masks={"fc": torch.tensor(mask)}, **changes)
    return model, t


def test_pruned_rows_are_zero_after_every_step_with_momentum_and_weight_decay():
    model, t = masked_trainer(batch_size=2, epochs=3, weight_decay=0.5)
    pulled, seen = [], []
    model.fc.weight.register_hook(lambda gradient: pulled.append(gradient[1].abs().sum().item()))
    model.register_forward_pre_hook(lambda *_: seen.append(model.fc.weight[1].abs().sum().item()))
    t.optimizer.register_step_post_hook(lambda *_: seen.append(model.fc.weight[1].abs().sum().item()))
    t.run()
    assert len(pulled) == 12 and all(value > 0.005 for value in pulled)  # every batch would move the row …
    assert len(seen) == 12 + 15 and not any(seen)                        # … and nothing ever did
    assert not model.fc.weight[1].any() and not t.best_state["fc.weight"][1].any()
    moments = t.optimizer.state[model.fc.weight]
    assert not any(moments[key][1].view(torch.int32).any() for key in ("exp_avg", "exp_avg_sq"))  # +0, as states leave out
    assert moments["exp_avg"][0].all() and moments["exp_avg_sq"][2].all()


def test_pruned_rows_that_hold_something_are_zeroed_at_the_beginning():
    model, t = masked_trainer((True, True, False), epochs=1)
    assert not model.fc.weight[2].any() and model.fc.weight[0, 1] == 0.5


def test_masks_hold_back_pruned_rows_only():
    # Ledger D13: a weight that is zero without being pruned is trained, and so is the bias of a pruned row.
    model, t = masked_trainer(epochs=1)
    before = snapshot(model)
    assert before["fc.weight"][0, 0] == 0
    t.run()
    moved = model.fc.weight != before["fc.weight"]
    assert moved.tolist() == [[True, True], [False, False], [True, True]]
    assert (model.fc.bias != before["fc.bias"]).all() and (model.head.weight != before["head.weight"]).all()


def test_without_masks_every_row_is_trained():
    model, t = masked_trainer(epochs=1)
    t.factors = None
    t.run()
    assert model.fc.weight.all()


# Training: errors, single images, random numbers


@pytest.mark.parametrize("bad", [math.nan, -3e38])  # the second times 9 is -inf, and the loss +inf
def test_a_loss_that_is_not_finite_names_the_phase(bad):
    t = trainer(Slope(9.0))
    t.run_epoch(what="cycle 2, fine-tuning")
    t.train_set = Points([[1.0], [bad], [1.0]], [0, 0, 0])
    with pytest.raises(FloatingPointError, match=r"cycle 2, fine-tuning.*epoch 2"):
        t.run_epoch(what="cycle 2, fine-tuning")
    assert len(t.history) == 1


def test_a_last_batch_of_one_image_does_not_stop_a_network_with_batchnorm():
    model = Modes()
    images = Points(torch.randn(7, 1, generator=seeded(6)), [0] * 7)
    t = trainer(model, images, Script([5, 6]), epochs=2, batch_size=3)
    assert math.isfinite(t.run().loss)
    assert len(t.history) == 2
    assert model.norm.num_batches_tracked.item() == 4  # batches of 3, 3, and not of 1


def test_a_training_set_of_one_image_is_trained_on():
    model = Slope(0.5)
    trainer(model, Points([[1.0]], [0]), epochs=1, batch_size=64).run()
    assert model.w.item() > 0.59


def test_batches_of_one_image_are_all_trained_on():
    # data.batch_size=1 is a permitted setting; a network without BatchNorm takes a step on every image.
    t = trainer(Slope(), Points(torch.ones(5, 1), [0] * 5), epochs=1, batch_size=1)
    assert len(rates_of(t)) == 5


def coloured(n, seed, augment=()):
    pixels = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=seeded(seed))
    return data.Images(pixels, torch.arange(n) % 3, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), augment)


CONV_MASKS = {"conv1": torch.tensor([True, False, True, True]),
              "conv2": torch.tensor([True, True, False, False, True])}


def convs_trainer(generator_seed=7, test=None, epochs=4):
    model = convs(seed=1)
    t = Trainer(model, coloured(20, 1, ("flip", "crop", "jitter")), test or coloured(12, 2), epochs=epochs, lr=0.01,
                weight_decay=0.1, patience=0, batch_size=8, eval_images=12, eval_batch_size=5,
                generator=seeded(generator_seed), blocks=conv_blocks(model), masks=CONV_MASKS)
    return model, t


def test_the_generator_alone_decides_a_run():
    ends = []
    for global_seed, generator_seed in ((1, 7), (2, 7), (1, 8)):
        model, t = convs_trainer(generator_seed, epochs=2)
        torch.manual_seed(global_seed)
        t.run()
        ends.append((snapshot(model), t.history))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert not same(ends[0][0], ends[2][0])


@pytest.mark.parametrize("hits", [(9, 4, 5, 3), (2, 4, 9, 3)])
def test_a_run_that_was_cut_after_an_epoch_ends_as_one_that_was_not(tmp_path, hits):
    class Labels:
        """Twelve images of which the network is told to be right on hits[k] in the k-th evaluation."""

        def __init__(self, model, hits):
            self.model, self.hits, self.images = model, list(hits), coloured(12, 2)

        def __len__(self):
            return 12

        def batches(self, batch_size, device="cpu", generator=None, limit=0):
            x, _ = self.images.batch(range(12))
            right, count = self.model(x).argmax(1), self.hits.pop(0)
            wrong = (right + 1) % 3
            yield x, torch.cat([right[:count], wrong[count:]])

    whole_model, whole = convs_trainer()
    whole.test_set = Labels(whole_model, hits)
    whole.run()
    assert [round(e.acc * 12 / 100) for e in whole.history] == list(hits)

    first_model, first = convs_trainer()
    first.test_set = Labels(first_model, hits)
    first.run_epoch()
    torch.save(first.state_dict(), tmp_path / "state.pt")

    torch.manual_seed(99)
    model = Convs()
    second = Trainer(model, first.train_set, Labels(model, hits[1:]), epochs=4, lr=0.01, weight_decay=0.1, patience=0,
                     batch_size=8, eval_images=12, eval_batch_size=5, generator=seeded(1234),
                     blocks=conv_blocks(model), masks=CONV_MASKS)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.history == whole.history[:1] and isinstance(second.history[0], Epoch)
    best = second.run()
    assert second.history == whole.history and best == whole.best
    assert same(snapshot(model), snapshot(whole_model))
    assert same(second.best_state, whole.best_state)
    assert torch.equal(second.generator.get_state(), whole.generator.get_state())


def test_a_finished_run_that_is_loaded_is_finished(tmp_path):
    model = Slope()
    t = trainer(model, test=Script([4, 6, 5, 5]), patience=2)
    t.run()
    torch.save(t.state_dict(), tmp_path / "state.pt")
    again = trainer(Slope(9.0), test=Script([]), patience=2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.finished and again.run() == t.best
    assert torch.equal(again.model.w, model.w)
