"""3×3 convolutions with fewer multiplications, for weights that stay as they are.

F(4×4, 3×3) of Winograd, in the form of Lavin and Gray (arXiv 1509.09308): Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A for every tile of 4×4
outputs, with the sum over the input channels as 36 matrix products. G g Gᵀ is computed once, which is why this pays where
a network sees images again and again, and not where every candidate has weights of its own.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.polynomial import polynomial
from torch import Tensor, nn

POINTS = (0, 1, -1, 2, -2)  # at which the polynomials of a tile are multiplied, besides infinity
TILE, SIZE = len(POINTS) - 1, len(POINTS) + 1  # outputs of a tile, and what it sees of the inputs, per side
ONES = POINTS.index(1) * (SIZE + 1)  # the product of a tile that goes into each of its outputs once
MIN_CHANNELS = 128  # inputs and outputs below which the transforms cost more than the multiplications that they save


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ [4, 6], G [6, 3] and Bᵀ [6, 6] in float64: Aᵀ[(G g) ⊙ (Bᵀ d)] is the correlation of g [3] with d [6], [4] (Toom
    and Cook's multiplication of polynomials, transposed)."""
    a, g, b = np.zeros((TILE, SIZE)), np.zeros((SIZE, 3)), np.zeros((SIZE, SIZE))
    for i, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        a[:, i] = np.power(float(point), range(TILE))
        g[i] = np.power(float(point), range(3)) / np.prod(np.subtract(point, others))
        b[i, :-1] = polynomial.polyfromroots(others)
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = polynomial.polyfromroots(POINTS)
    return torch.from_numpy(a), torch.from_numpy(g), torch.from_numpy(b)


class WinogradConv2d(nn.Conv2d):
    """A convolution that :func:`fits` in place of ``conv``, with its parameters, for as long as they stay as they are.

    An ordinary convolution where functional_call puts other weights, and for images that fill their tiles so badly that
    more than half of the multiplications are left.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.transformed = (conv.weight,)  # not as a parameter of its own
        like = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        a, g, b = transforms()
        with torch.no_grad():
            products = torch.einsum("au,oiuv,bv->abio", g, conv.weight.double().cpu(), g).flatten(0, 1)
        self.factors = products.to(**like).contiguous()  # [36, inputs, outputs]
        self.enter, self.leave = torch.kron(b, b).to(**like), torch.kron(a, a).to(**like)

    def forward(self, x):  # [B, inputs, H, W] → [B, outputs, H, W]
        count, channels, height, width = x.shape
        rows, columns = -(-height // TILE), -(-width // TILE)
        if self.weight is not self.transformed[0] or 2 * SIZE**2 * rows * columns > 9 * height * width:
            return super().forward(x)
        padded = x.new_empty(count, rows * TILE + 2, columns * TILE + 2, channels)
        for edge in (padded[:, :1], padded[:, height + 1:], padded[:, :, :1], padded[:, :, width + 1:]):
            edge.zero_()
        padded[:, 1:height + 1, 1:width + 1] = x.permute(0, 2, 3, 1)
        tiles = padded.unfold(1, SIZE, TILE).unfold(2, SIZE, TILE).permute(0, 1, 2, 4, 5, 3).reshape(-1, SIZE**2, channels)
        # Small products tile by tile, [36, 36] and [16, 36] on the left: one large product would go to one thread.
        entered = self.enter.expand(len(tiles), -1, -1) @ tiles  # [tiles, 36, inputs]
        products = entered.transpose(0, 1) @ self.factors  # [36, tiles, outputs]
        if self.bias is not None:
            products[ONES] += self.bias
        left = self.leave.expand(len(tiles), -1, -1) @ products.transpose(0, 1)  # [tiles, 16, outputs]
        y = left.view(count, rows, columns, TILE, TILE, -1).transpose(2, 3).reshape(count, rows * TILE, columns * TILE, -1)
        return y[:, :height, :width].permute(0, 3, 1, 2)


def fits(module: nn.Module) -> bool:
    """Whether a module is a convolution that this pays for: dense, 3×3, stride 1, padded by 1, of many channels."""
    return type(module) is nn.Conv2d and min(module.in_channels, module.out_channels) >= MIN_CHANNELS and (
        module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode) == (
        (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def with_winograd(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in which every convolution that :func:`fits` is a :class:`WinogradConv2d`."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if fits(child):
                setattr(module, name, WinogradConv2d(child))
    return network
