#!/usr/bin/env python3
"""The same training in PyTorch: `parity.py FOLDER --threads N`.

FOLDER holds plan.json, the weights that both sides begin with (of student and teacher), the views of every step, and what the Rust
side made of them: its losses and its weights at the end. Prints both sides' losses and, of every tensor at the end, how far the
weights lie apart, as JSON.
"""

import argparse
import json
import pathlib

import torch

import tensors
from forgetting_run import learning_rate
from runtime import channels_last
from training import distillation, network, ntxent, optimiser


def train(plan, folder):
    """The losses of all steps, and the student at the end."""
    student = channels_last(network(plan, folder)).train()
    teacher = channels_last(network(plan, folder)).eval().requires_grad_(False)
    mover, parameters = optimiser(student, plan), list(student.parameters())
    losses = []
    for step in range(plan["steps"]):
        views = channels_last(torch.from_numpy(tensors.load(folder / f"views-{step:03}.safetensors")["views"]))
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


def distances(student, folder):
    """Of each tensor that is learned: the norm of the difference over the norm."""
    found = {}
    for part, name in zip(student, ["encoder", "projector"]):
        ours = tensors.load(folder / f"ours-{name}.safetensors")
        for parameter, value in part.named_parameters():
            other = torch.from_numpy(ours[parameter])
            found[f"{name}.{parameter}"] = ((value.detach() - other).norm() / value.detach().norm()).item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = json.loads((arguments.folder / "plan.json").read_text())
    losses, student = train(plan, arguments.folder)
    print(json.dumps({"losses": losses, "distances": distances(student, arguments.folder), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
