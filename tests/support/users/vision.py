"""Networks on images, sound and volumes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def double_conv(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Skip concatenations; one way up by a transposed convolution, one by interpolation."""

    shapes = ((3, 8, 8),)
    groups = {"enc1.0": 4, "enc2.0": 6, "mid.0": 8, "up2": 5, "dec2.0": 6, "dec1.0": 4}

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = double_conv(3, 4), double_conv(4, 6), double_conv(6, 8)
        self.up2, self.dec2 = nn.ConvTranspose2d(8, 5, 2, stride=2), double_conv(5 + 6, 6)
        self.dec1, self.head = double_conv(6 + 4, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        b = self.dec2(torch.cat([self.up2(c), b], 1))
        a = self.dec1(torch.cat([F.interpolate(b, scale_factor=2, mode="bilinear"), a], 1))
        return self.head(a)


class C2f(nn.Module):
    """YOLOv8's block: a convolution is chunked, one half goes through bottlenecks, all parts are joined."""

    def __init__(self, i: int, o: int, n: int = 1) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = nn.Conv2d(i, 2 * self.c, 1), nn.Conv2d((2 + n) * self.c, o, 1)
        self.m = nn.ModuleList(nn.Conv2d(self.c, self.c, 3, padding=1) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(y[-1] + m(y[-1]).relu() for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """Two scales, spatial pyramid pooling, and per scale a box and a class branch that are joined and flattened."""

    shapes = ((3, 16, 16),)
    groups = {
        "stem": 4,
        "c2f.cv1": 3,
        "c2f.cv2": 6,
        "down": 8,
        "sppf.cv1": 4,
        "sppf.cv2": 8,
        "box.0.0": 5,
        "box.1.0": 5,
        "cls.0.0": 4,
        "cls.1.0": 4,
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c2f, self.down = nn.Conv2d(3, 4, 3, 2, 1), C2f(4, 6), nn.Conv2d(6, 8, 3, 2, 1)
        self.sppf = nn.ModuleDict({"cv1": nn.Conv2d(8, 4, 1), "cv2": nn.Conv2d(16, 8, 1)})
        widths = (6, 8)
        self.box = nn.ModuleList(nn.Sequential(nn.Conv2d(w, 5, 3, padding=1), nn.Conv2d(5, 4 * 4, 1)) for w in widths)
        self.cls = nn.ModuleList(nn.Sequential(nn.Conv2d(w, 4, 3, padding=1), nn.Conv2d(4, 3, 1)) for w in widths)
        self.register_buffer("bins", torch.arange(4.0))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.c2f(F.silu(self.stem(x)))
        y = self.sppf["cv1"](self.down(fine))
        pools = [y]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        coarse = self.sppf["cv2"](torch.cat(pools, 1))
        out = []
        for level, box, cls in zip((fine, coarse), self.box, self.cls, strict=True):
            n, _, h, w = level.shape
            corners = box(level).view(n, 4, 4, h * w).softmax(2)  # distances as distributions over bins
            corners = torch.einsum("nkbp,b->nkp", corners, self.bins)
            out.append(torch.cat([corners, cls(level).flatten(2).sigmoid()], 1))
        return out


class Generator(nn.Module):
    """A GAN's generator: a linear layer makes a small image, transposed convolutions enlarge it."""

    shapes = ((10,),)
    groups = {"fc": 8, "up1": 6, "up2": 4}

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.fc, self.norm = nn.Linear(10, 8 * 4 * 4), nn.BatchNorm2d(8)
        self.up1, self.norm1 = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6)
        self.up2, self.out = nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.norm(self.fc(z).view(-1, self.width, 4, 4)).relu()
        x = F.leaky_relu(self.norm1(self.up1(x)), 0.2)
        return self.out(self.up2(x)).tanh()


class Sound(nn.Module):
    """1-D: strided, dilated and depthwise convolutions with a gate, as in wave models."""

    shapes = ((1, 32),)
    groups = {"stem": 6, "filter": 8, "point": 5}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv1d(1, 6, 5, stride=2), nn.Conv1d(6, 6, 3, groups=6, padding="same")
        self.filter, self.gate = nn.Conv1d(6, 8, 3, dilation=2), nn.Conv1d(6, 8, 3, dilation=2)
        self.point, self.norm, self.head = nn.Conv1d(8, 5, 1), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(self.stem(x)).relu()
        x = self.filter(x).tanh() * self.gate(x).sigmoid()
        return self.head(F.adaptive_avg_pool1d(self.norm(self.point(x)), 1).squeeze(-1))


class Volume(nn.Module):
    """3-D with a residual stream and a way back up."""

    shapes = ((1, 4, 8, 8),)
    groups = {"stem": 4, "a": 6, "down": 5, "up": 3}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 6, 1), nn.Conv3d(6, 4, 3, padding=1)
        self.norm, self.down = nn.InstanceNorm3d(4, affine=True), nn.Conv3d(4, 5, 2, stride=2)
        self.up, self.head = nn.ConvTranspose3d(5, 3, 2, stride=2), nn.Conv3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm(x + self.b(self.a(x).relu()))
        return self.head(self.up(F.max_pool3d(self.down(x), 1)).relu())


class Siamese(nn.Module):
    """Two inputs go through one encoder as one batch, and are compared."""

    shapes = ((3, 8, 8), (3, 8, 8))
    groups = {"encoder.0": 6, "encoder.2": 4}

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(torch.cat([a, b])).mean((2, 3)).chunk(2)
        return self.head((a - b).abs())


class Recursive(nn.Module):
    """One block used at two depths, and again under another name; a projection shared by two scales."""

    shapes = ((3, 8, 8),)
    groups = {"stem": 6, "block.0": 4, "lateral": 5}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        self.again = self.block
        self.lateral, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.block(x)
        z = F.avg_pool2d(y + self.again(y), 2)
        return self.head(self.lateral(y).amax((2, 3)) + self.lateral(z).mean((2, 3)))


class Calibrated(nn.Module):
    """Buffers that follow from widths: statistics per channel, a table of positions × channels, a scale."""

    shapes = ((3, 4, 4),)
    groups = {"stem": 6}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 2)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("table", torch.randn(1, 16, 6), persistent=False)
        self.register_buffer("scale", torch.tensor(6.0**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) - self.mean.view(-1, 1, 1)
        return self.head(((x.flatten(2).transpose(1, 2) + self.table) * self.scale).relu().amax(1))


VISION = [UNet, Yolo, Generator, Sound, Volume, Siamese, Recursive, Calibrated]
