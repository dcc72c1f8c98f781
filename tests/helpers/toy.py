"""A tiny task with the shape of the real ones: two towers that return lists, fusion, heads, two losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, VOCAB, LENGTH = 16, 23, 6
Batch = dict[str, Tensor]


class PoisonGradient(torch.autograd.Function):
    """Identity whose gradient is nan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("nan")


class Block(nn.Module):
    """Pre-norm residual block; `scale` is a parameter used directly, outside any submodule."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)  # last, as in real layers: nothing after it saves a tensor
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        y = F.gelu(self.dense(self.norm(x))) * self.scale
        return x + self.out(F.dropout(y, self.dropout, self.training))


class Tower(nn.Module):
    def __init__(self, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(num_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask=mask))
        return states


class ToyTask(nn.Module):
    """Token prediction (`mlm`) and matching (`itm`); `extra` is used on chosen steps only."""

    def __init__(self, dropout: float = 0.0, num_layers: int = 2) -> None:
        super().__init__()
        self.loss_weights = {"mlm": 1.0, "itm": 0.5}
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.project = nn.Linear(4, WIDTH)
        self.text = Tower(num_layers, dropout)
        self.image = Tower(num_layers, dropout)
        self.cross_modal = nn.ModuleList(Block(dropout) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(num_layers + 1))
        self.mlm_score = nn.Linear(WIDTH, VOCAB)
        self.itm_score = nn.Linear(WIDTH, 2)
        self.extra = nn.Linear(WIDTH, 1)

    def fuse(self, text: list[Tensor], image: list[Tensor], mask: Tensor) -> Tensor:
        weights = self.mix.softmax(0)
        x = (
            sum(w * state for w, state in zip(weights, text, strict=True))
            + torch.stack(image).mean((0, 2))[:, None]
        )
        for layer in self.cross_modal:
            x = layer(x, mask)
        return x

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mask = batch["text_mask"][..., None].float()
        text = self.text(self.embedding(batch["text_ids"]), mask)
        image = self.image(self.project(batch["pixels"]))
        x = self.fuse(text, image, mask)
        labels = batch["mlm_labels"]
        keep = labels >= 0
        logits = self.mlm_score(x[keep])
        count = keep.sum()
        mlm = F.cross_entropy(logits, labels[keep], reduction="sum") / count.clamp(min=1)
        # The second fusion shares the towers' states, as the real objectives do.
        swapped = [state[batch["itm_image_index"]] for state in image]
        pooled = self.fuse(text, swapped, mask)[:, 0]
        itm_logits = self.itm_score(pooled)
        itm = F.cross_entropy(itm_logits, batch["itm_labels"])
        if bool(batch.get("use_extra", torch.zeros(1)).any()):
            itm = itm + self.extra(pooled).square().mean()
        if "too_large" in batch:
            torch.empty(1 << 50, dtype=torch.uint8)
        if "poison_gradient" in batch:
            mlm = PoisonGradient.apply(mlm)
        if "poison_loss" in batch:
            mlm = mlm * batch["poison_loss"].mean()
        right = (itm_logits.argmax(-1) == batch["itm_labels"]).sum()
        report = {"itm_accuracy": torch.stack([right.double(), torch.tensor(float(len(pooled))).double()])}
        return {"mlm": mlm, "itm": itm}, report

    def loss_counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"mlm": (batch["mlm_labels"] >= 0).sum(), "itm": torch.tensor(len(batch["itm_labels"]))}

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        losses, report = self(batch)
        rows = float(len(batch["itm_labels"]))
        report["itm_loss"] = torch.stack([losses["itm"].double() * rows, torch.tensor(rows).double()])
        return report

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["itm_accuracy"] - metrics["itm_loss"]

    def heatmaps(self) -> dict[str, Tensor]:
        return {"mix": self.mix.softmax(0)[None].detach()}

    def parameter_role(self, name: str) -> str:
        if name.startswith(("mlm_score", "itm_score", "extra")):
            return "head"
        return "cross_modal" if name.startswith(("cross_modal", "mix")) else "tower"

    def checkpointable_layers(self) -> list[nn.Module]:
        return [*self.text.layers, *self.image.layers, *self.cross_modal]

    def flops_per_sample(self) -> float:
        return 6.0 * sum(parameter.numel() for parameter in self.parameters()) * LENGTH


def make_task(dropout: float = 0.0, seed: int = 0, num_layers: int = 2) -> ToyTask:
    torch.manual_seed(seed)
    return ToyTask(dropout, num_layers)


def sample(position: int, seed: int = 0) -> Batch:
    """One sample, a pure function of its position in the stream; half of them have no masked token."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=generator)
    labels = torch.where(torch.rand(LENGTH, generator=generator) < 0.3, ids, torch.tensor(-100))
    length = int(torch.randint(2, LENGTH + 1, (1,), generator=generator))
    mask = (torch.arange(LENGTH) < length).long()
    matched = int(torch.randint(0, 2, (1,), generator=generator))
    pixels = torch.randn(3, 4, generator=generator) + ids[:1].float() / VOCAB * matched
    return {
        "text_ids": ids,
        "mlm_labels": labels,
        "text_mask": mask,
        "pixels": pixels,
        "itm_labels": torch.tensor(matched),
    }


def make_batch(positions: list[int], seed: int = 0) -> Batch:
    rows = [sample(position, seed) for position in positions]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    batch["itm_image_index"] = torch.arange(len(rows))
    batch["sample_ids"] = torch.tensor(positions)
    return batch


class ToyStream:
    """Global batch g = positions [g * G, (g + 1) * G), cut into ranks x accumulation micro-batches."""

    def __init__(
        self, global_batch: int, micro_batch: int, rank: int, world_size: int, seed: int = 0
    ) -> None:
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.closed = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @property
    def counters(self) -> dict[str, float]:
        return {"data/met": 1.0}

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        step = first_step
        while True:
            start = step * self.global_batch
            positions = list(range(start, start + self.global_batch))
            size = self.micro_batch
            chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
            share = len(chunks) // self.world_size
            yield [self.batch(step, chunk) for chunk in chunks[self.rank * share : (self.rank + 1) * share]]
            step += 1

    def batch(self, step: int, positions: list[int]) -> Batch:
        return make_batch(positions, self.seed)

    def close(self) -> None:
        self.closed = True
