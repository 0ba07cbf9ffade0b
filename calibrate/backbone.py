"""Bottleneck ResNets (He et al. 2016; wide ones, Zagoruyko & Komodakis 2016) built from a state dict's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_EXPANSION = 4
_LAYERS = 3
"""layer1 to layer3; deeper ones and the classifier are not needed."""


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        passed = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.relu(self.bn3(self.conv3(x)) + passed)
        return result


class ResNetFeatures(nn.Module):
    """A ResNet up to its third layer; `forward` returns the outputs of layer 2 and layer 3.

    Module names are torchvision's, so its published state dicts fit (WideResNet-101-2 is the paper's backbone).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Build the network that a state dict belongs to and load it.

        Raises ValueError when it is not that of a bottleneck ResNet.
        """
        super().__init__()
        try:
            stem = state["conv1.weight"].shape[0]
            self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(stem)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
            channels = stem
            for layer in range(1, _LAYERS + 1):
                blocks = []
                pattern = re.compile(rf"layer{layer}\.(\d+)\.conv3\.weight")
                numbers = {int(found[1]) for name in state if (found := pattern.fullmatch(name))}
                for block in range(max(numbers) + 1):
                    name = f"layer{layer}.{block}"
                    width, per_group = state[f"{name}.conv2.weight"].shape[:2]
                    out = state[f"{name}.conv3.weight"].shape[0]
                    stride = 2 if layer > 1 and block == 0 else 1
                    blocks.append(_Bottleneck(channels, width, out, stride, width // per_group))
                    channels = out
                setattr(self, f"layer{layer}", nn.Sequential(*blocks))
            self.load_state_dict({name: state[name] for name in self.state_dict() if name in state})
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"not the state dict of a bottleneck ResNet: {str(error).splitlines()[0]}") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of layer 2 and layer 3 for (N, 3, H, W), ImageNet-normalised."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        second: Tensor = self.layer2(self.layer1(x))
        third: Tensor = self.layer3(second)
        return [second, third]
