"""The published networks that are the base of docs/RESULTS.md: how runs use them, and those of He et al. (2016) for
CIFAR-10.

    python hirelc.py --model evidence/networks.py:resnet20 --weights resnet20-cifar10.pth …
"""

import torch.nn.functional as F
from torch import nn

CIFAR = "data.name=cifar10 data.image_size=32 data.normalize=imagenet data.batch_size=128"
# name → flags; weights; images; training to theta_0, on them, where the weights are of other classes; repair
NETWORKS = {
    "resnet20": ("--model evidence/networks.py:resnet20", "resnet20-cifar10.pth", CIFAR, "",
                 "data.train_images=20000 finetune.epochs=3 finetune.lr=1e-3"),
    "resnet56": ("--model evidence/networks.py:resnet56", "resnet56-cifar10.pth", CIFAR, "",
                 "data.train_images=20000 finetune.epochs=2 finetune.lr=1e-3"),
    "mobilenetv2": ("--exp 5", "mobilenetv2_100.pth", "data.image_size=128 data.normalize=pretrained",
                    "baseline.epochs=5 baseline.lr=5e-4",
                    "data.train_images=20000 finetune.epochs=1 finetune.lr=1e-4"),
    "resnet18": ("--exp 4", "resnet18.pth", "data.image_size=128 data.normalize=pretrained",
                 "baseline.epochs=3 baseline.lr=1e-4",
                 "data.train_images=20000 finetune.epochs=1 finetune.lr=1e-4"),
    "deit_tiny": ("--exp 1", "deit_tiny.pth",
                  "model.name=deit_tiny_patch16_224 data.image_size=112 data.normalize=pretrained",
                  "baseline.epochs=5 baseline.lr=1e-4",
                  "data.train_images=20000 finetune.epochs=1 finetune.lr=1e-4")}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A): every second pixel, missing channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """6 n + 2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, a classifier."""

    def __init__(self, n: int, num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(n - 1)))
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20(num_classes: int = 10) -> ResNet:
    """Return ResNet-20: 0.27 M parameters, published accuracy on CIFAR-10 91.73 %."""
    return ResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """Return ResNet-56: 0.85 M parameters, published accuracy on CIFAR-10 93.39 %."""
    return ResNet(9, num_classes)
