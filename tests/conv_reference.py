"""Convolution problems for tests: operands in any layout, the answers in float64."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
LAYOUTS = ("contiguous", "channels_last")


def lay(x, layout):
    """x with its channels outermost or innermost."""
    if layout == "contiguous":
        return x.contiguous()
    order = (0, *range(2, x.dim()), 1)
    return x.permute(order).contiguous().permute(0, x.dim() - 1, *range(1, x.dim() - 1))


@dataclass
class Conv:
    """One problem: sizes as in the native calls; w is [K, C/groups, *kernel]."""

    N: int
    C: int
    K: int
    size: tuple
    kernel: tuple
    stride: tuple = ()
    padding: tuple = ()
    dilation: tuple = ()
    groups: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 1
    high: int = 3  # operands are integers up to this; 0: normal
    x: torch.Tensor = field(init=False)

    def __post_init__(self):
        n = len(self.size)
        self.stride, self.dilation = self.stride or (1,) * n, self.dilation or (1,) * n
        self.padding = self.padding or (0,) * n
        g = torch.Generator().manual_seed(self.seed)

        def values(*shape):
            x = (
                torch.randint(-self.high, self.high + 1, shape, generator=g)
                if self.high
                else torch.randn(shape, generator=g)
            )
            return x.to(self.dtype)

        self.x, self.w = values(self.N, self.C, *self.size), values(self.K, self.C // self.groups, *self.kernel)
        self.bias, self.bias_in = values(self.K), values(self.C)
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        self.out = tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes)
        self.dy = values(self.N, self.K, *self.out)

    @property
    def options(self):
        names = ("stride", "padding", "dilation")
        return {name: list(getattr(self, name)) for name in names} | {"groups": self.groups}

    def operands(self, pass_):
        """(read, bias, shape of what is written) of forward or dgrad."""
        if pass_ == "forward":
            return self.x, self.bias, self.dy.shape
        return self.dy, self.bias_in, self.x.shape

    def reference(self, pass_, *, absolute=False):
        """What forward or dgrad gives, with the bias, in float64."""
        x, w, dy, bias, bias_in = (t.double() for t in (self.x, self.w, self.dy, self.bias, self.bias_in))
        if absolute:
            x, w, dy, bias, bias_in = (t.abs() for t in (x, w, dy, bias, bias_in))
        if 0 in (self.C, self.K):  # nothing to sum; torch gets the shape wrong
            shape = self.operands(pass_)[2]
            return (bias if pass_ == "forward" else bias_in).view(-1, *(1,) * len(self.size)).expand(shape)
        args = (self.stride, self.padding, self.dilation, self.groups)
        if pass_ == "forward":
            return CONV[len(self.size)](x, w, bias, *args)
        x = torch.zeros_like(x).requires_grad_()
        (dx,) = torch.autograd.grad(CONV[len(self.size)](x, w, None, *args), x, dy)
        return dx + bias_in.view(-1, *(1,) * len(self.size))
