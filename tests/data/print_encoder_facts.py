"""Prints what the tests of src/model compare with: names and shapes of timm's and torchvision's parameters, and the
outputs of their forward pass on weights from a closed formula that both sides can compute.

    pip install torch==2.15.0 torchvision==0.29.2 timm==1.0.31 numpy==2.4.6
    python tests/data/print_encoder_facts.py tests/data

writes parameter_names_vit_tiny_patch16_224.txt, parameter_names_resnet18.txt and golden_encoders.json there.
"""

import json
import math
import pathlib
import sys

import numpy as np
import timm
import torch
import torchvision


def uniform(count: int) -> np.ndarray:
    """`count` values in [-1, 1), a pure function of (index, count): 32-bit integer mixing, exact on both sides."""
    x = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(count)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x45D9F3B)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return x.astype(np.float64) / 2**31 - 1.0


def formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Matrices keep the variance of their input, scales stay near 1, variances positive."""
    count = math.prod(shape)
    v = uniform(count)
    if name.endswith("running_var"):
        v = 1.0 + 0.5 * v
    elif len(shape) == 1:
        v = (1.0 if name.endswith("weight") else 0.0) + 0.1 * v
    else:
        v = v * math.sqrt(6.0 / (count // shape[0]))
    return torch.from_numpy(v.astype(np.float32)).reshape(shape)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    state = {n: formula(n, tuple(t.shape)) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def images(batch: int, size: int) -> torch.Tensor:
    return torch.from_numpy(uniform(batch * 3 * size * size).astype(np.float32)).reshape(batch, 3, size, size)


def resnet18() -> torch.nn.Module:
    model = torchvision.models.resnet18(weights=None)
    model.fc = torch.nn.Identity()
    return model


def vit_tiny(**options) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **options)


def write_names(directory: pathlib.Path, title: str, call: str, model: torch.nn.Module) -> None:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    lines = [
        f"# {call}: .state_dict(), name, dtype and shape of each entry.",
        f"# Printed by: python tests/data/print_encoder_facts.py tests/data   ({versions})",
    ]
    for name, tensor in model.state_dict().items():
        shape = "x".join(str(d) for d in tensor.shape) or "scalar"
        lines.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape}")
    (directory / f"parameter_names_{title}.txt").write_text("\n".join(lines) + "\n")


def row_ends(out: torch.Tensor) -> dict[str, list[float]]:
    """Eight numbers from either end, and the mean size of all."""
    flat = out.detach().double()
    return {"first": flat[0, :8].tolist(), "last": flat[-1, -8:].tolist(), "mean_abs": [flat.abs().mean().item()]}


def golden() -> dict:
    torch.manual_seed(0)
    vit = fill(vit_tiny(img_size=64)).eval()
    net = fill(resnet18()).train()
    x = images(4, 64)
    x.requires_grad_(False)
    train = net(x)
    # A loss that touches every output differently, to compare a gradient that went through the whole network.
    weights = torch.from_numpy(uniform(train.numel()).astype(np.float32)).reshape(train.shape)
    (train * weights).sum().backward()
    stem = net.conv1.weight.grad.flatten()[:8].double().tolist()
    mean, var = net.layer4[1].bn2.running_mean[:8].double().tolist(), net.layer4[1].bn2.running_var[:8].double().tolist()
    evaluated = net.eval()(x)
    return {
        "vit_tiny_image64_patch16_batch2": row_ends(vit(images(2, 64))),
        "resnet18_image64_batch4_train": row_ends(train),
        "resnet18_image64_batch4_train_conv1_weight_grad": stem,
        "resnet18_image64_batch4_train_layer4.1.bn2": {"running_mean": mean, "running_var": var},
        "resnet18_image64_batch4_eval_after_one_train_pass": row_ends(evaluated),
    }


def main() -> None:
    directory = pathlib.Path(sys.argv[1])
    write_names(directory, "resnet18", "torchvision.models.resnet18() with fc = torch.nn.Identity()", resnet18())
    write_names(
        directory,
        "vit_tiny_patch16_224",
        "timm.create_model('vit_tiny_patch16_224', num_classes=0)",
        vit_tiny(),
    )
    (directory / "golden_encoders.json").write_text(json.dumps(golden(), indent=2) + "\n")


if __name__ == "__main__":
    main()
