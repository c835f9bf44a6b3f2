"""Small networks that are not of this project, images for them, a silent log, and how to tell that one is untouched."""

import io
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_flatten

from support.log import Log


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def silent():
    return Log(open(os.devnull, "w"))


def pictures(n=40, channels=3, size=16, classes=3):
    """Noise with a brighter channel or corner per class, floats [n, C, size, size], and labels."""
    y = torch.arange(n) % classes
    x = torch.randn(n, channels, size, size, generator=seeded(n))
    x[:, 0] += y.view(-1, 1, 1)
    return x, y


class Made(nn.Module):
    """Modules by name, and ``run(self, x)`` that is their forward."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


class Shared(nn.Module):
    """One convolution used twice under two names, an in-place activation, BatchNorm, dropout; 1-channel images."""

    def __init__(self):
        super().__init__()
        self.stem, self.once = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.dw = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.again = self.once
        self.bn, self.drop, self.fc = nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu_()
        x = self.dw(self.again(F.relu(self.once(x))))
        return self.fc(self.drop(x.mean((2, 3))))


class Attend(nn.Module):
    """A patch embedding and a TransformerEncoderLayer, whose in_proj_weight no module holds."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 2,
                                             enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Flattening(nn.Module):
    """Flattens with view, which channels-last feature maps do not allow; a weight-normed and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), parametrizations.weight_norm(nn.Conv2d(6, 4, 3, 2, 1))
        self.c, self.d = nn.Linear(64, 12), nn.Linear(12, 3)
        self.a.weight.requires_grad_(False)
        self.calls = []

    def forward(self, x):
        return self.d(F.relu(self.c(self.b(F.relu(self.a(x))).view(-1, 64))))


class Plain(nn.Module):
    """No BatchNorm and no padding; a 1x1 convolution, a layer that is used twice, weights handed to functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3, 2, padding="valid")
        self.w, self.fc = nn.Parameter(torch.randn(10, 6)), nn.Linear(10, 3)

    def forward(self, x):
        x = F.silu(self.a(x))
        x = F.gelu(self.b(F.leaky_relu(self.b(x))))
        x = F.conv2d(x, self.c.weight, self.c.bias, 2).amax((2, 3))
        return self.fc(torch.tanh(x @ self.w.t()))


class Grouped(nn.Module):
    """Convolutions in groups, one with two channels per input; a gate; a padded concatenation; mixed channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1, groups=4)
        self.dw, self.gate = nn.Conv2d(8, 16, 5, 2, padding=2, groups=8), nn.Conv2d(16, 16, 1)
        self.end, self.fc = nn.Conv2d(32, 12, 3, 2, dilation=2, padding=2), nn.Linear(12, 3)

    def forward(self, x):
        x = self.dw(F.hardswish(self.b(F.elu(self.a(x)))))
        gate = self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        x = F.max_pool2d(F.pad(torch.cat([x * gate, x], 1), (1, 0, 2, 1)), 2)
        x = self.end(x)
        return self.fc((x.softmax(1) + x).flatten(1).view(-1, 12, x.shape[2] * x.shape[3]).mean(2))


class Caching(Plain):
    """Computes something from a kernel on its way into eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.b.weight.detach().sin()
        return self

    def forward(self, x):
        factor = self.b.weight.sin() if self.training else self.kept
        return super().forward(x) * factor.mean((1, 2, 3))[:3]


def strided():
    """The flattening network with a kernel whose outputs are not outermost in memory."""
    model = Flattening()
    model.a.weight = nn.Parameter(model.a.weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    return model


def randomised(model, seed=0):
    """Weights, biases and statistics such that neither a constant nor the images are lost on the way; eval mode."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            mean, std = (0.2, 0.3) if name.endswith(("bias", "mean")) else (1, 0.15)
            if tensor.dim() > 1:
                mean, std = 0, (2 / tensor[0].numel()) ** 0.5
            if tensor.is_floating_point():
                tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))
    return model.eval()


class Trap(str):
    """No network: unpickled, it would make the folder that it names."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def snapshot(model):
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a, b):
    """Whether two state dicts have the same tensors, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def through_a_file(state):
    """A state through a file, read as plain data only."""
    torch.save(state, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def fingerprint(model):
    """Everything that may not change: tensors bit by bit, modes, requires_grad, gradients, hooks."""
    return (snapshot(model), [m.training for m in model.modules()],
            [(n, p.requires_grad, p.grad, p.data_ptr()) for n, p in model.named_parameters()],
            [(list(m._forward_hooks.values()), list(m._forward_pre_hooks.values())) for m in model.modules()])


def same(one, two):
    """Whether nested dictionaries, lists, tensors and other values are the same, bit by bit."""
    (ones, form), (twos, other) = tree_flatten(one), tree_flatten(two)
    return form == other and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ones, twos))


def tied():
    """The shared network with the shared module's weight in a third module, too."""
    model = Shared()
    model.fc = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 3, 1, 1), nn.Flatten(), model.fc)
    model.fc[1].weight = model.once.weight
    return model
