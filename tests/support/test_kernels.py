"""Kernels and blocks of networks that this project did not write: each structural rule on a network of a few layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

import models
from support.kernels import CLASSIFIER, ELSEWHERE, INDIRECT, SHORTCUT, UNREACHED, ParameterKernel, traced_kernels
from config import InputError
from models import build, find_blocks, survey
from networks import Made
from support.own import try_network

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Net(Made):
    """A network from its modules and the function that is its forward; a head for three classes is added."""

    def __init__(self, forward, head=4, **modules):
        super().__init__(forward, **modules)
        if head:
            self.head = nn.Linear(head, 3)

    def forward(self, x):
        y = super().forward(x)
        return self.head(y.flatten(2).mean(2) if y.dim() == 4 else y) if hasattr(self, "head") else y


def conv(inputs, outputs, size=3, **settings):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings)


def kernels(model, example=X, **settings):
    """Names of the kernels in order, and name → reason of those left out."""
    found = survey(model, example, **settings)
    names = [name for block in found.blocks for name in block.kernels]
    assert names == [k.name for k in found.compressed]
    return names, {k.name: k.reason for k in found.excluded}


def test_kernels_come_in_forward_order_and_in_groups_of_four():
    model = Net(lambda m, x: m.a(m.b(m.c(m.d(m.e(x))))), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 4),
                e=conv(3, 4))
    blocks = find_blocks(model, X)
    assert [list(b.kernels) for b in blocks] == [["e", "d", "c", "b"], ["a"]]
    assert [b.name for b in blocks] == ["group0", "group1"]
    assert blocks[0].parameters == tuple(f"{n}.{leaf}" for n in "edcb" for leaf in ("weight", "bias"))
    assert blocks[1].kernels["a"] is model.a and blocks[1].tensors == {"a": ("a.weight",)}


def streamed(m, x):
    x = m.a(x)
    x = x + m.b(x)
    return (x + m.c(x)).mean((2, 3))


def probed(m, x):
    x = m.a(x)
    m.probe(x.mean((2, 3)))
    return m.b(x)


@pytest.mark.parametrize("model, names, excluded", [
    # the classifier: the last of several Linear layers, not the last registered, a 1×1 convolution, several heads
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(),
                           nn.Linear(8, 3), nn.LogSoftmax(dim=1)), ["1", "4"], {"6": CLASSIFIER}),
    (lambda: Net(lambda m, x: m.out(m.a(x).mean((2, 3))), head=0, out=nn.Linear(4, 3), a=conv(3, 4)), ["a"],
     {"out": CLASSIFIER}),
    (lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), ["0"],
     {"2": CLASSIFIER}),
    (lambda: Net(lambda m, x: torch.stack([h(m.a(x).mean((2, 3))) for h in m.heads]).mean(0), head=0, a=conv(3, 4),
                 heads=nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])), ["a"],
     {"heads.0": CLASSIFIER, "heads.1": CLASSIFIER}),
    # a residual stream that ends in the logits; a result that does not reach them
    (lambda: Net(streamed, head=0, a=conv(3, 3), b=conv(3, 3), c=conv(3, 3)), ["a", "b"], {"c": CLASSIFIER}),
    (lambda: Net(probed, a=conv(3, 4), probe=nn.Linear(4, 2), b=conv(4, 4)), ["a", "probe", "b"], {"head": CLASSIFIER}),
    # kernels that the forward never reaches
    (lambda: Net(lambda m, x: m.layers[2](m.layers[1](m.layers[0](x)) if x.sum() > 1e9 else m.layers[0](x)),
                 layers=nn.ModuleList([conv(3, 4), conv(4, 4), nn.Sequential(conv(4, 4), nn.ReLU()), conv(4, 4)])),
     ["layers.0", "layers.2.0"], {"head": CLASSIFIER, "layers.1": UNREACHED, "layers.3": UNREACHED}),
    # shortcuts: a Linear; none where the branch starts from another tensor or the projection is used elsewhere, too
    (lambda: Net(lambda m, x: m.b(F.gelu(m.a(m.norm(x.flatten(1))))) + m.short(m.norm(x.flatten(1))), head=6,
                 norm=nn.Identity(), a=nn.Linear(192, 8), b=nn.Linear(8, 6), short=nn.Linear(192, 6)), ["a", "b"],
     {"short": SHORTCUT, "head": CLASSIFIER}),
    (lambda: Net(lambda m, x: m.b(F.relu(m.a(x[:, :, ::2].clone() * 2))) + m.p(m.q(x)[:, :, ::2]), head=8,
                 a=conv(3, 4), b=conv(4, 8), p=conv(4, 8, 1), q=conv(3, 4)), ["a", "b", "q", "p"],
     {"head": CLASSIFIER}),
    (lambda: Net(lambda m, x: m.short(m.b(F.relu(m.a(x))) + m.short(x)), a=conv(3, 4), b=conv(4, 3),
                 short=conv(3, 3, 1), head=3), ["a", "b", "short"], {"head": CLASSIFIER})])
def test_what_is_compressed_and_what_is_left_out(model, names, excluded):
    assert kernels(model()) == (names, excluded)


def test_a_classifier_whose_weight_is_computed():
    model = Net(lambda m, x: m.a(x), a=conv(3, 4))
    parametrizations.weight_norm(model.head)
    names, left = kernels(model)
    assert names == ["a"] and left == {"head": CLASSIFIER}
    found = survey(model, X, scope="all")  # where a classifier is compressed, that is not why it is not
    assert "parametri" in found.excluded[0].reason and found.coverage < 1
    cosine = Net(lambda m, x: F.linear(F.normalize(m.a(x).mean((2, 3))), F.normalize(m.out.weight)), head=0,
                 a=conv(3, 4), out=nn.Linear(4, 3, bias=False))
    assert kernels(cosine) == (["a"], {"out": CLASSIFIER})


def residual(shortcut, *branch, add=lambda y, s: y + s, before=conv(3, 4)):
    """head(relu(add(branch(x), shortcut(x)))) with x = before(images)."""
    def run(m, x):
        x = m.stem(x)
        return F.relu(add(m.branch(x), m.short(x)))
    return Net(run, head=8, stem=before, branch=nn.Sequential(*branch), short=shortcut)


def two():
    return conv(4, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8)


@pytest.mark.parametrize("shortcut, name", [
    (lambda: nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8)), "short.0"),
    (lambda: conv(4, 8, 1), "short"),
    (lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(4, 8, 1, bias=False), nn.GroupNorm(2, 8)), "short.1"),
    (lambda: nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()), "short.0")])
@pytest.mark.parametrize("add", [lambda y, s: y + s, lambda y, s: s + y, lambda y, s: y.add_(s).mul_(2)])
def test_a_1x1_projection_on_a_shortcut_is_left_out(shortcut, name, add):
    names, left = kernels(residual(shortcut(), *two(), add=add))
    assert names == ["stem", "branch.0", "branch.3"] and left == {name: SHORTCUT, "head": CLASSIFIER}


@pytest.mark.parametrize("model, names", [
    # a branch of one kernel, as in RepVGG
    (lambda: residual(conv(4, 8, 1), conv(4, 8)), ["stem", "branch.0", "short"]),
    # not 1×1
    (lambda: residual(conv(4, 8, 3), *two()), ["stem", "branch.0", "branch.3", "short"]),
    # pooled after the projection
    (lambda: residual(nn.Sequential(conv(4, 8, 1), nn.MaxPool2d(3, 1, 1)), *two()),
     ["stem", "branch.0", "branch.3", "short.0"]),
    # multiplied or concatenated, not added
    (lambda: residual(conv(4, 8, 1), *two(), add=lambda y, s: y * s), ["stem", "branch.0", "branch.3", "short"]),
    (lambda: residual(conv(4, 8, 1), *two(), add=lambda y, s: torch.cat([y, s], 1)[:, ::2]),
     ["stem", "branch.0", "branch.3", "short"]),
    # an identity shortcut that starts right after a 1×1
    (lambda: residual(nn.Identity(), conv(4, 6), nn.ReLU(), conv(6, 4), add=lambda y, s: torch.cat([y + s] * 2, 1),
                      before=conv(3, 4, 1)), ["stem", "branch.0", "branch.2"])])
def test_what_only_looks_like_a_shortcut_is_compressed(model, names):
    assert kernels(model()) == (names, {"head": CLASSIFIER})


def attend(other=None):
    """Tokens of 4 × 4 pixels through nn.MultiheadAttention; ``other``: keys and values of another width."""
    def run(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)  # [B, T, 8]
        y = m.other(x)
        return (x + m.attn(x, y, y, need_weights=False)[0]).mean(1)
    return Net(run, 8, patch=nn.Conv2d(3, 8, 4, stride=4), other=nn.Linear(8, other) if other else nn.Identity(),
               attn=nn.MultiheadAttention(8, 2, batch_first=True, kdim=other, vdim=other))


@pytest.mark.parametrize("training", [False, True])
def test_attention_weights_that_are_parameters_of_their_own(training):
    model = attend().train(training)
    found = survey(model, X)
    assert [k.name for k in found.compressed] == ["patch", "attn.in_proj_weight", "attn.out_proj"]
    block, = found.blocks
    assert isinstance(block.kernels["attn.in_proj_weight"], ParameterKernel)
    assert block.kernels["attn.in_proj_weight"].weight is model.attn.in_proj_weight
    assert block.tensors == {"patch": ("patch.weight",), "attn.in_proj_weight": ("attn.in_proj_weight",),
                             "attn.out_proj": ("attn.out_proj.weight",)}
    assert block.parameters == ("patch.weight", "patch.bias", "attn.in_proj_weight", "attn.in_proj_bias",
                                "attn.out_proj.weight", "attn.out_proj.bias")
    assert found.coverage == 1.0 and model.training == training


def test_separate_query_key_and_value_weights():
    names, left = kernels(attend(other=6))
    assert names == ["patch", "other", "attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight",
                     "attn.out_proj"] and left == {"head": CLASSIFIER}
    first, second = find_blocks(attend(other=6), X, exclude="patch")
    assert first.parameters == ("other.weight", "other.bias", "attn.q_proj_weight", "attn.in_proj_bias",
                                "attn.k_proj_weight", "attn.v_proj_weight")  # the bias of all three counts once


def test_weights_given_to_functions_and_those_of_other_modules():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv, self.lin = nn.ConvTranspose2d(3, 3, 2), conv(3, 4), nn.Linear(4, 4)
            self.one, self.weight = nn.Conv1d(4, 4, 1), nn.Parameter(torch.ones(4, 4))
            self.table, self.head = nn.Parameter(torch.ones(5, 4)), nn.Linear(4, 3)

        def forward(self, x):
            x = F.conv2d(self.up(x), self.conv.weight, self.conv.bias, padding=1)
            x = torch.einsum("bi,oi->bo", self.one(x.flatten(2)).mean(2), self.lin.weight)
            return self.head(F.linear(x, self.weight) + self.table[1])
    model = Functions()
    found = survey(model, X)
    assert [k.name for k in found.compressed] == ["conv", "lin", "weight"]  # the last one held by no layer
    assert found.blocks[0].parameters == ("conv.weight", "conv.bias", "lin.weight", "lin.bias", "weight")
    assert {k.name: k.reason.partition(",")[0] for k in found.excluded} == {
        "up": "weight of a ConvTranspose2d", "one": "weight of a Conv1d", "head": CLASSIFIER}
    assert found.coverage == pytest.approx((108 + 16 + 16) / (108 + 16 + 36 + 16 + 16))
    with pytest.raises(InputError, match="groups: up is excluded: weight of a ConvTranspose2d"):
        survey(model, X, groups=[["up"]])


def test_what_is_read_past_its_module_or_by_an_operation_that_is_not_followed_is_named():
    model = Net(lambda m, x: m.deform(y := m.b(F.conv2d(x, m.kept[0])), m.offsets(y)), a=conv(3, 4), b=conv(4, 4),
                offsets=conv(4, 18), deform=torchvision.ops.DeformConv2d(4, 4, 3, padding=1))
    model.kept = [model.a.weight]
    names, reasons = kernels(model)
    assert names == ["b", "offsets"] and reasons["a"] == ELSEWHERE and reasons["head"] == CLASSIFIER
    assert reasons["deform"].startswith("weight of a DeformConv2d") and len(reasons) == 3
    with pytest.raises(InputError, match="groups: a is excluded"):
        survey(model, X, groups=[["a"]])


def test_a_shared_module_is_one_kernel_with_all_its_names():
    shared = conv(4, 4)
    model = Net(lambda m, x: m.again(m.b(m.first(m.a(x)))), a=conv(3, 4), first=shared, b=conv(4, 4), again=shared)
    found = survey(model, X)
    assert [k.name for k in found.compressed] == ["a", "first", "b"]
    assert sum(k.params for k in found.compressed) == 108 + 144 + 144
    block, = found.blocks
    assert block.state_names == ("a.weight", "first.weight", "again.weight", "b.weight")
    assert block.parameters.count("first.weight") == 1 and "again.weight" not in block.parameters
    assert kernels(model, exclude=["again"])[0] == ["a", "b"]


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm,
                                  torch.nn.utils.spectral_norm, parametrizations.orthogonal,
                                  lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_a_computed_weight_is_left_out_by_name(wrap):
    model = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=nn.Conv2d(4, 4, 1))
    wrap(model.b)
    names, left = kernels(model)
    assert names == ["a"] and set(left) == {"b", "head"} and "computed from other parameters (b." in left["b"]


def test_a_weight_that_the_forward_changes_before_its_use():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)
    names, left = kernels(Net(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=Standardised(4, 4, 3)))
    assert names == ["a"] and left == {"b": INDIRECT, "head": CLASSIFIER}


def chain():
    return Net(lambda m, x: m.body(m.stem(x)), stem=conv(3, 4), body=nn.Sequential(*(conv(4, 4) for _ in range(5))))


def test_exclude_takes_names_prefixes_and_patterns():
    assert kernels(chain(), exclude="stem")[0] == [f"body.{i}" for i in range(5)]
    names, left = kernels(chain(), exclude=("stem", "body.[13]"))
    assert names == ["body.0", "body.2", "body.4"] and left["body.3"] == "left out by exclude=body.[13]"
    assert kernels(chain(), exclude=["body"])[0] == ["stem"]
    assert kernels(chain(), exclude=["body.2.weight", "head"])[1]["head"] == CLASSIFIER
    assert survey(chain(), X, exclude=["body.0"]).coverage == pytest.approx((108 + 4 * 144) / (108 + 5 * 144))


def test_groups_are_the_blocks():
    found = survey(chain(), X, groups=[["body.3", "stem"], ["head"]])
    assert [list(b.kernels) for b in found.blocks] == [["body.3", "stem"], ["head"]]
    assert {k.reason for k in found.excluded} == {"in none of the groups"} and len(found.excluded) == 4
    assert found.coverage == pytest.approx((108 + 144) / (108 + 5 * 144))  # the classifier does not count


@pytest.mark.parametrize("settings, message", [
    ({"exclude": ["stam"]}, "no kernel is called 'stam'; close: stem"),
    ({"exclude": ["body", "stem"]}, "nothing to compress"),
    ({"groups": [["stem"], ["body.9"]]}, "no kernel is called 'body.9'; close: body"),
    ({"groups": [["stem", "stem"]]}, "named twice"),
    ({"groups": [["stem"], []]}, "none of them empty"),
    ({"groups": ["stem"]}, "lists of kernel names"),
    ({"groups": [["stem"]], "exclude": ["stem"]}, "stem is excluded: left out by exclude=stem")])
def test_names_that_cannot_be_meant(settings, message):
    with pytest.raises(InputError, match=message) as error:
        survey(chain(), X, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model, message", [
    (lambda: Net(lambda m, x: {"out": m.a(x)}, head=0, a=conv(3, 4)), "returns a dict.*expected logits"),
    (lambda: Net(lambda m, x: (m.a(x), x), head=0, a=conv(3, 4)), "returns a tuple"),
    (lambda: Net(lambda m, x: m.a(x), head=0, a=conv(3, 4)), r"returns torch.float32 \[2, 4, 8, 8\]"),
    (lambda: Net(lambda m, x: m.a(x), head=0, a=conv(5, 4)), "fails on a batch of images.*RuntimeError"),
    (lambda: Net(lambda m, x: m.a(torch.zeros(2, 4)), head=0, a=nn.Linear(4, 3)), "do not depend on the images"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "nothing to compress; 1: classifier")])
def test_networks_that_cannot_be_used(model, message):
    with pytest.raises(InputError, match=message) as error:
        survey(model(), X)
    assert "\n" not in str(error.value) and torch.backends.mha.get_fastpath_enabled()


def test_looking_leaves_the_network_as_it_was():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.last = x.mean().reshape(1)
            return x.add_(torch.rand(1))  # writes into its input, draws in eval mode too
    model = nn.Sequential(Counting(), conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), conv(4, 4), nn.BatchNorm2d(4).eval(),
                          nn.Flatten(), nn.Linear(256, 3))
    model[4].weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    images, generator = X.clone(), torch.get_rng_state()
    for look in (lambda: survey(model, images), lambda: try_network(model, images)):
        look()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        assert modes == [m.training for m in model.modules()] and torch.equal(images, X)
        assert torch.equal(generator, torch.get_rng_state()) and not model[4].weight.requires_grad


@pytest.mark.parametrize("name, count, blocks, shortcuts", [
    ("densenet121", 120, 30, 0), ("regnet_y_400mf", 81, 21, 4), ("swin_t", 52, 13, 0), ("efficientnet_b0", 81, 21, 0),
    ("shufflenet_v2_x0_5", 56, 14, 0)])
def test_structure_of_the_zoo(name, count, blocks, shortcuts):
    model = torchvision.models.get_model(name, weights=None, num_classes=5)
    found = survey(model, torch.randn(2, 3, 64, 64))
    assert (len(found.compressed), len(found.blocks)) == (count, blocks)
    # Counted here from the modules alone: every Conv2d and Linear is compressed or named.
    own = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    reasons = {k.name: k.reason for k in found.excluded}
    assert {k.name: k.params for k in found.compressed + found.excluded} == own
    assert sorted(reasons.values()) == [SHORTCUT] * shortcuts + [CLASSIFIER]
    classifier, = (n for n, reason in reasons.items() if reason == CLASSIFIER)
    assert classifier == [n for n in own][-1] and len(model.get_submodule(classifier).weight) == 5
    compressed = sum(own[k.name] for k in found.compressed)
    assert found.coverage == compressed / (sum(own.values()) - own[classifier]) >= 0.95


def test_the_traced_rule_agrees_with_the_papers_networks():
    names = [k for b in find_blocks(build("resnet18", 3, width=0.1)) for k in b.kernels]
    theirs = torchvision.models.resnet18(num_classes=3)
    assert [k for b in find_blocks(theirs, torch.randn(1, 3, 32, 32)) for k in b.kernels] == names
    for network, extra in (("resnet18", set()), ("resnet50", set()), ("mobilenetv2_100", {"conv_head"}),
                           ("deit_small_patch16_224", {"patch_embed.proj"})):
        model = build(network, 3, 32, 0.1)
        traced = [k.name for k in traced_kernels(model, torch.randn(2, 3, 32, 32)) if not k.reason]
        named = [k for b in models.find_blocks(model) for k in b.kernels]
        assert set(traced) - set(named) == extra and [k for k in traced if k not in extra] == named
