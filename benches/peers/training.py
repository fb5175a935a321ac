"""A training step: SimCLR with lwf distillation from a frozen teacher, AdamW, clipping.

Variants: `eager`, `compile` (f32), `eager-bf16`, `compile-bf16` (autocast). Convolutional encoders run channels_last.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

import models
import tensors
from runtime import TorchSide, channels_last

NOT_DECAYED = ("pos_embed", "cls_token")


def ntxent(z, tau):
    """SimCLR's loss of [2n, d]: row i and row i + n are views of one frame."""
    z = F.normalize(z, dim=1)
    logits = z @ z.T / tau
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    target = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, target)


def distillation(q, t, tau):
    logits = F.normalize(q, dim=1) @ F.normalize(t, dim=1).T / tau
    target = torch.arange(len(q), device=q.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def network(plan, folder):
    encoder = models.load(models.encoder(plan), tensors.load(folder / "encoder.safetensors"))
    head = models.projector(encoder.feature_dim, plan)
    return nn.Sequential(encoder, models.load(head, tensors.load(folder / "projector.safetensors")))


def optimiser(student, plan):
    decayed, others = [], []
    for name, parameter in student.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith(NOT_DECAYED)
        (decayed if decays else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": plan["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (plan["beta1"], plan["beta2"])
    return torch.optim.AdamW(groups, lr=plan["learning_rate"], betas=betas, fused=True)


class Side(TorchSide):
    def __init__(self, plan, arguments):
        super().__init__(arguments.threads)
        self.plan = plan
        self.variant = arguments.variant
        device = torch.device(plan["device"])
        self.student = network(plan, arguments.folder).train().to(device)
        self.teacher = network(plan, arguments.folder).eval().requires_grad_(False).to(device)
        views = torch.from_numpy(tensors.load(arguments.folder / "views.safetensors")["views"])
        self.views = views.to(device)
        if plan["architecture"].startswith("resnet"):
            self.student, self.teacher = channels_last(self.student), channels_last(self.teacher)
            self.views = channels_last(self.views)
        self.parameters = list(self.student.parameters())
        self.optimiser = optimiser(self.student, plan)
        self.loss = torch.compile(self.eager_loss) if "compile" in self.variant else self.eager_loss
        self.description = "PyTorch " + self.variant
        # The first steps from equal weights on equal views: equal losses mean equal gradients and updates too.
        self.check = [self.step() for _ in range(plan["checked_steps"])]

    def eager_loss(self, views):
        bf16 = self.variant.endswith("bf16")
        device = self.views.device.type
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            z = self.student(views)
            with torch.no_grad():
                t = self.teacher(views)
        z, t = z.float(), t.float()
        return ntxent(z, self.plan["tau"]) + self.plan["lambda"] * distillation(z, t, self.plan["tau_d"])

    def step(self):
        loss = self.loss(self.views)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.plan["clip_norm"], foreach=True)
        self.optimiser.step()
        return loss.item()

    def repeat(self):
        for _ in range(self.plan["inner"]):
            self.step()
