"""The encoders and the projector in plain PyTorch, by timm's and torchvision's names.

Each computes what the Rust side computes: the driver compares their losses and features on the same weights.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """timm's vit_tiny without a classifier: the normalised class token is the feature."""

    def __init__(self, image_size, patch, width=192, depth=12, heads=3):
        super().__init__()
        self.feature_dim = width
        tokens = (image_size // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        # A norm looks at one token at a time: only the one that is read needs it.
        return self.norm(x[:, 0])


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """`stages` lists (blocks, channels, stride of the first block)."""

    def __init__(self, stem, stages, max_pool):
        super().__init__()
        kernel, padding, channels = stem
        self.conv1 = nn.Conv2d(3, channels, kernel, 2, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if max_pool else nn.Identity()
        self.stages = len(stages)
        for index, (blocks, width, stride) in enumerate(stages):
            layer = []
            for block in range(blocks):
                layer.append(BasicBlock(channels, width, stride if block == 0 else 1))
                channels = width
            setattr(self, f"layer{index + 1}", nn.Sequential(*layer))
        self.feature_dim = channels

    def forward(self, images):
        x = self.pool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for index in range(self.stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return x.mean((2, 3))


def encoder(plan):
    """The encoder that plan.json names, with PyTorch's initial weights."""
    match plan["architecture"]:
        case "vit_tiny":
            return VisionTransformer(plan["image_size"], plan["patch_size"])
        case "resnet18":
            stages = [(2, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 2)]
            return ResNet((7, 3, 64), stages, max_pool=True)
        case "resnet_small":
            return ResNet((3, 1, 24), [(1, 24, 1), (1, 48, 2), (1, 96, 2)], max_pool=False)
        case other:
            raise ValueError(f"unknown architecture {other!r}")


def projector(inputs, plan):
    hidden, outputs = plan["projector_hidden"], plan["projector_dim"]
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


def load(module, arrays):
    """Every name must be there, and no other."""
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=True)
    return module
