"""One run of the forgetting benchmark in PyTorch: SimCLR on period a, lwf on period b, then probes, as the Rust side.

Variants: `eager`, `compile` (the losses and the augmentation; compiled before the first run). Frames are decoded once and
lie in memory as uint8. torchvision's v2 transforms draw one crop a call: called view by view they take as much CPU time
as the training step, so views are augmented here as a batch, in a tenth of it, with a crop, factors and coins for each.
"""

import math
import pathlib

import PIL.Image
import numpy
import torch
from torch.nn import functional as F

from runtime import TorchSide, channels_last
from training import distillation, network, ntxent, optimiser

SEED = 8
EMBED_BATCH = 512
VOTE_TEMPERATURE = 0.07
SHOTS, DRAWS = 10, 5
CROP_TRIES = 10
COMPILER_STEPS = 16
CROP_RATIO = (3 / 4, 4 / 3)
LUMA = (0.299, 0.587, 0.114)


class Period:
    """Frames [n, 3, size, size] of uint8 with their labels, to train and to test on."""

    def __init__(self, folder, size):
        self.train, self.train_labels = self.read(folder / "train", size)
        self.test, self.test_labels = self.read(folder / "test", size)

    @staticmethod
    def read(folder, size):
        frames, labels = [], []
        for number, label in enumerate(sorted(folder.iterdir())):
            for path in sorted(label.iterdir()):
                image = PIL.Image.open(path).convert("RGB")
                if image.size != (size, size):
                    raise ValueError(f"{path} is not {size} x {size}")
                frames.append(numpy.asarray(image))
                labels.append(number)
        frames = torch.from_numpy(numpy.stack(frames)).permute(0, 3, 1, 2).contiguous()
        return frames, torch.tensor(labels)


class Views:
    """SimCLR's augmentation of a batch, parameters drawn for each view."""

    def __init__(self, plan, compiled):
        self.plan = plan
        self.mean = torch.tensor(plan["mean"]).view(3, 1, 1)
        self.std = torch.tensor(plan["std"]).view(3, 1, 1)
        self.luma = torch.tensor(LUMA).view(3, 1, 1)
        fused = torch.compile if compiled else lambda function: function
        self.parts = [fused(part) for part in (self.brightness, self.contrast, self.saturation, self.hue)]
        self.normalised = fused(self.eager_normalised)

    def __call__(self, frames):
        """Two views of each: [2 n, 3, size, size]."""
        frames = torch.cat([frames, frames]).float() / 255
        count = len(frames)
        frames = F.grid_sample(frames, self.grid(frames), "bilinear", "border", align_corners=False)
        applied = (torch.rand(count) < self.plan["jitter_probability"]).float()
        factors = [self.factor(strength, count) for strength in self.plan["jitter"][:3]]
        factors = [1 + (factor - 1) * applied for factor in factors]
        factors.append((2 * torch.rand(count) - 1) * self.plan["jitter"][3] * applied)
        # One order a batch, as libraries for batches do.
        for part in torch.randperm(4).tolist():
            frames = self.parts[part](frames, factors[part].view(count, 1, 1, 1))
        grey = torch.rand(count, 1, 1, 1) < self.plan["grey_probability"]
        return channels_last(self.normalised(frames, grey))

    @staticmethod
    def factor(strength, count):
        return 1 + (2 * torch.rand(count) - 1) * strength

    def grid(self, frames):
        """Where each pixel of a view comes from: torchvision's random resized crop, and a flip."""
        count, size = len(frames), frames.shape[-1]
        low, high = self.plan["crop_scale"]
        area = (low + (high - low) * torch.rand(CROP_TRIES, count)) * size * size
        low, high = map(math.log, CROP_RATIO)
        ratio = torch.exp(low + (high - low) * torch.rand(CROP_TRIES, count))
        width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (width <= size) & (height <= size)
        chosen = fits.int().argmax(0, keepdim=True)
        width, height = width.gather(0, chosen)[0], height.gather(0, chosen)[0]
        fits = fits.any(0)
        width, height = width.where(fits, torch.tensor(float(size))), height.where(fits, torch.tensor(float(size)))
        left = (torch.rand(count) * (size - width + 1)).floor()
        top = (torch.rand(count) * (size - height + 1)).floor()
        flip = 1 - 2 * (torch.rand(count) < self.plan["flip_probability"]).float()
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = flip * width / size, height / size
        theta[:, 0, 2], theta[:, 1, 2] = (2 * left + width) / size - 1, (2 * top + height) / size - 1
        return F.affine_grid(theta, list(frames.shape), align_corners=False)

    def grey(self, x):
        return (x * self.luma).sum(1, keepdim=True)

    def brightness(self, x, factor):
        return (x * factor).clamp(0, 1)

    def contrast(self, x, factor):
        return (factor * x + (1 - factor) * self.grey(x).mean((2, 3), keepdim=True)).clamp(0, 1)

    def saturation(self, x, factor):
        return (factor * x + (1 - factor) * self.grey(x)).clamp(0, 1)

    def hue(self, x, turn):
        largest, arg = x.max(1, keepdim=True)
        spread = largest - x.amin(1, keepdim=True)
        red, green, blue = x.split(1, 1)
        difference = torch.where(arg == 0, green - blue, torch.where(arg == 1, blue - red, red - green))
        sector = difference / spread.where(spread > 0, torch.ones(())) + 2 * arg + 6 * turn
        k = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + sector) % 6
        return largest - spread * torch.minimum(k, 4 - k).clamp(0, 1)

    def eager_normalised(self, x, grey):
        x = torch.where(grey, self.grey(x).expand_as(x), x)
        return (x - self.mean) / self.std


def learning_rate(plan, step, steps):
    warm_up = round(plan["warmup_ratio"] * steps)
    if step < warm_up:
        return plan["learning_rate"] * (step + 1) / warm_up
    return plan["learning_rate"] * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def knn(bank, bank_labels, queries, query_labels, k):
    similarity, found = (F.normalize(queries) @ F.normalize(bank).T).topk(k)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[found], ((similarity - 1) / VOTE_TEMPERATURE).exp())
    return (votes.argmax(1) == query_labels).float().mean().item()


def linear(bank, bank_labels, queries, query_labels):
    """scikit-learn's LogisticRegression(C=1) on standardised features by PyTorch's L-BFGS, which is quicker here."""
    mean, std = bank.mean(0), bank.std(0, correction=0)
    # A feature without variance is left alone, as scikit-learn does.
    std = std.where(std > 0, torch.ones(()))
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes, width = int(bank_labels.max()) + 1, bank.shape[1]
    weight = torch.zeros(classes, width, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, max_eval=600, tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(F.linear(bank, weight, bias), bank_labels) + weight.square().sum() / (2 * len(bank))
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        return (F.linear(queries, weight, bias).argmax(1) == query_labels).float().mean().item()


def few_shot(bank, bank_labels, queries, query_labels):
    scores = []
    for _ in range(DRAWS):
        order = torch.randperm(len(bank))
        chosen = torch.cat([order[bank_labels[order] == label][:SHOTS] for label in bank_labels.unique()])
        scores.append(linear(bank[chosen], bank_labels[chosen], queries, query_labels))
    return sum(scores) / DRAWS


def linear_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


class Side(TorchSide):
    def __init__(self, plan, arguments):
        super().__init__(arguments.threads)
        self.plan = plan
        folders = sorted(pathlib.Path(arguments.folder, "stream").resolve().iterdir())
        self.a, self.b = (Period(folder, plan["image_size"]) for folder in folders)
        # The same modules in every run: compiled code belongs to them.
        self.student = channels_last(network(plan, arguments.folder))
        self.teacher = channels_last(network(plan, arguments.folder)).eval().requires_grad_(False)
        self.initial = {name: value.clone() for name, value in self.student.state_dict().items()}
        compiled = arguments.variant == "compile"
        self.views = Views(plan, compiled)
        self.loss = torch.compile(self.eager_loss) if compiled else self.eager_loss
        self.description = "PyTorch " + arguments.variant
        self.warm_up_compiler()
        self.student.load_state_dict(self.initial)
        first = torch.cat([self.embed(period.test[:1]) for period in (self.a, self.b)])
        self.check = first[:, : plan["checked_values"]].flatten().tolist()

    def warm_up_compiler(self):
        # Long enough for the orders of the colours' parts, whose memory layouts are compiled one by one.
        for has_teacher in (False, True):
            self.learn(self.a, COMPILER_STEPS, has_teacher)

    def eager_loss(self, views, has_teacher):
        z = self.student(views)
        loss = ntxent(z, self.plan["tau"])
        if not has_teacher:
            return loss
        with torch.no_grad():
            t = self.teacher(views)
        return loss + self.plan["lambda"] * distillation(z, t, self.plan["tau_d"])

    def learn(self, period, steps, has_teacher):
        self.student.train()
        mover = optimiser(self.student, self.plan)
        parameters = list(self.student.parameters())
        batch, order = self.plan["batch"], []
        for step in range(steps):
            if not order:
                order = list(torch.randperm(len(period.train)).split(batch))
                order = [frames for frames in order if len(frames) == batch]
            views = self.views(period.train[order.pop()])
            loss = self.loss(views, has_teacher)
            mover.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.plan["clip_norm"], foreach=True)
            for group in mover.param_groups:
                group["lr"] = learning_rate(self.plan, step, steps)
            mover.step()
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss of step {step} is not finite")

    @torch.no_grad()
    def embed(self, frames):
        self.student.eval()
        features = []
        for part in frames.split(EMBED_BATCH):
            views = channels_last((part.float() / 255 - self.views.mean) / self.views.std)
            features.append(self.student[0](views))
        return torch.cat(features)

    def measure(self, period):
        bank, queries = self.embed(period.train), self.embed(period.test)
        asked = (bank, period.train_labels, queries, period.test_labels)
        return [linear(*asked), knn(*asked, self.plan["k"]), few_shot(*asked)], queries

    def repeat(self):
        torch.manual_seed(SEED)
        self.student.load_state_dict(self.initial)
        steps_a, steps_b = self.plan["period_steps"]
        self.learn(self.a, steps_a, False)
        before, old = self.measure(self.a)
        self.teacher.load_state_dict(self.student.state_dict())
        self.learn(self.b, steps_b, True)
        after, new = self.measure(self.a)
        learnt, _ = self.measure(self.b)
        self.check = before + after + learnt + [linear_cka(new, old)]
