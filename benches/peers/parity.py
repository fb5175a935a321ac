#!/usr/bin/env python3
"""The same training in PyTorch: `parity.py FOLDER --threads N`.

In f64, where rounding has no time to grow, and in f32 beside it: what PyTorch's own rounding comes to is the measure of ours.

FOLDER holds plan.json, the weights that both sides begin with (of student and teacher), the views of every step, and what the Rust
side made of them: its losses and its weights at the end. Prints the losses and how far the weights at the end lie from f64's, as JSON.
"""

import argparse
import json
import pathlib

import torch

import tensors
from forgetting_run import learning_rate
from training import distillation, network, ntxent, optimiser


def train(plan, folder, dtype):
    """The losses of all steps, and the student at the end."""
    student = network(plan, folder).train().to(dtype)
    teacher = network(plan, folder).eval().requires_grad_(False).to(dtype)
    mover, parameters = optimiser(student, plan), list(student.parameters())
    losses = []
    for step in range(plan["steps"]):
        views = torch.from_numpy(tensors.load(folder / f"views-{step:03}.safetensors")["views"]).to(dtype)
        z = student(views)
        with torch.no_grad():
            t = teacher(views)
        loss = ntxent(z, plan["tau"]) + plan["lambda"] * distillation(z, t, plan["tau_d"])
        mover.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan["clip_norm"], foreach=True)
        for group in mover.param_groups:
            group["lr"] = learning_rate(plan, step, plan["steps"])
        mover.step()
        losses.append(loss.item())
    return losses, student


def weights(student):
    return torch.cat([parameter.detach().double().flatten() for parameter in student.parameters()])


def our_weights(student, folder):
    """The Rust side's, in the same order."""
    found = []
    for part, name in zip(student, ["encoder", "projector"]):
        ours = tensors.load(folder / f"ours-{name}.safetensors")
        found += [torch.from_numpy(ours[parameter]).double().flatten() for parameter, _ in part.named_parameters()]
    return torch.cat(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = json.loads((arguments.folder / "plan.json").read_text())
    losses, student = train(plan, arguments.folder, torch.float64)
    losses_f32, student_f32 = train(plan, arguments.folder, torch.float32)
    exact = weights(student)
    distance = lambda others: ((others - exact).norm() / exact.norm()).item()
    found = {
        "losses": losses,
        "losses_f32": losses_f32,
        "distance": distance(our_weights(student, arguments.folder)),
        "distance_f32": distance(weights(student_f32)),
        "torch": torch.__version__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
