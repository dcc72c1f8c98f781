"""Image-text pairs scored per second, from cached tower states: the published way beside ours.

    python -m benchmarks.retrieval [--sizes quickstart base] [--save]
    python -m benchmarks.retrieval --sizes base --precisions bf16 --items 16 500 --chunks 500 250    # on a GPU
    python -m benchmarks.retrieval --plan

Both get the same tower states of the same items (values are drawn, sizes and weights are the model's), first score
the same pairs, which must agree, and are then timed in turns.

- published: all texts padded to 40 tokens; for each image, its cached layers get type and layer embeddings and are
  expanded to a chunk of texts, the cross-modal encoder runs on the chunk with managers that stack the experts and
  attention that is written out (`plain_step.fuse_stacks`), under autocast; texts wait padded on the device
- model: the same chunks through our model's own fusion (fused attention, statistics of experts shared)
- ours: `mt_deepspeed.scoring.pairs`, texts cut to their lengths
- ours, padded: the same with 40 tokens, as the published weights need it
- ours, shortlist: as ours, but half of the pairs, drawn for each image: no batch of texts serves two images

Freed memory is kept on a CPU, as all our commands do it; `--system-malloc` leaves it to glibc, for all ways.

`--plan` counts operations of both ways at the full size and predicts times; nothing of that is measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_step import fuse_stacks
from benchmarks.record import add_save, append
from mt_deepspeed.config import RunConfig, load_config
from mt_deepspeed.engine.launch import Place, keep_freed_memory
from mt_deepspeed.engine.precision import DTYPES, autocast
from mt_deepspeed.evaluation.recall import NOT_SCORED
from mt_deepspeed.models.pair_fusion import PairFusion
from mt_deepspeed.scoring.pairs import PairScorer
from mt_deepspeed.scoring.state_cache import StateCache
from mt_deepspeed.scoring.states import States, batches
from mt_deepspeed.tasks import build_task
from mt_deepspeed.tasks.retrieval import match_scores

PADDED = 40
PRESETS = {"quickstart": "quickstart-retrieval", "base": "flickr30k-retrieval-base-scratch"}
ITEMS = {"quickstart": (8, 1024), "base": (4, 16)}
"""Images and texts that are scored in one round, on a CPU."""
CHUNKS = {"quickstart": (512, 256), "base": (4, 4)}
"""Texts per pass, published and ours: what was fastest on two cores. The published code fuses 500 on a GPU."""
SETS = {"Flickr30k test": (1000, 5000, 128), "COCO 5K test": (5000, 25000, 256)}
"""Images, texts, and the published length of a shortlist."""
H200_DENSE_BF16 = 989e12
ASSUMED_USE = 0.4
"""Share of the peak that the prediction assumes for both ways."""


class Case:
    """One model size: a task with drawn weights, tower states of `items` (images and texts)."""

    def __init__(
        self, size: str, precision: Literal["fp32", "bf16"], items: Sequence[int], chunks: Sequence[int]
    ) -> None:
        config = load_config(PRESETS[size])
        model = replace(config.model, mask_padding_in_managers=True)
        train = replace(config.train, precision=precision, micro_batch_size=chunks[1])
        self.config: RunConfig = replace(config, model=model, train=train)
        torch.manual_seed(0)
        self.task: Any = build_task(self.config).eval().requires_grad_(False)
        self.chunk = chunks[0]
        self.dtype = DTYPES[precision] or torch.float32
        self.place = Place(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.task.to(self.place.device)
        num_images, num_texts = items
        # As captions are: 8 to 22 tokens, 15 on average; shortest first, as the evaluation sorts them.
        lengths = torch.linspace(8, 22, num_texts).round().long().tolist()
        width = model.cross_modal.hidden_size
        patches = (model.vision.image_size // model.vision.patch_size) ** 2 + 1
        text_shape, image_shape = (model.num_text_states, width), (model.num_image_states, width)
        self.images = StateCache([patches] * num_images, image_shape, self.dtype, None)
        self.texts = StateCache(lengths, text_shape, self.dtype, None)
        self.padded = StateCache([PADDED] * num_texts, text_shape, self.dtype, None)
        for cache in (self.images, self.padded):
            for item in range(len(cache.lengths)):
                cache.put(item, torch.randn(cache.lengths[item], *cache.get(item).shape[1:]))
        for item, length in enumerate(lengths):
            self.texts.put(item, self.padded.get(item)[:length])
        self.masks = (torch.arange(PADDED) < torch.tensor(lengths)[:, None]).long()
        every = [torch.randperm(num_texts) < num_texts // 2 for _ in range(num_images)]
        self.shortlist = torch.stack(every)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> scores `[images, texts]`, `NOT_SCORED` where not asked for."""
        return {
            "published": lambda: self._by_chunks(self._published),
            "model": lambda: self._by_chunks(self._model),
            "ours": self._ours(self.texts, None),
            "ours, padded": self._ours(self.padded, self.masks),
            "ours, shortlist": self._ours(self.texts, None, self.shortlist),
        }

    def _ours(
        self, texts: StateCache, masks: Tensor | None, wanted: Tensor | None = None
    ) -> Callable[[], Tensor]:
        states = States(texts, masks, torch.arange(len(texts.lengths)), self.images, None, None)
        scorer = PairScorer(self.task, self.config, states, self.place, wanted)
        return lambda: scorer(range(len(self.images.lengths)))

    @cached_property
    def chunks(self) -> list[tuple[Tensor, Tensor]]:
        """Padded texts `[B, L, N, D]` and masks of each chunk, on the device."""
        device = self.place.device
        every = batches(range(len(self.padded.lengths)), self.chunk)
        return [(self.padded.padded(one)[0].to(device), self.masks[one].to(device)) for one in every]

    @torch.no_grad()
    def _by_chunks(self, fuse: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        rows = []
        with autocast(self.config.train.precision, self.place.device):
            for image in range(len(self.images.lengths)):
                image_PND = self.images.get(image).to(self.place.device)
                scores = []
                for texts, mask in self.chunks:
                    cls_feats = fuse(texts, mask, image_PND)
                    scores.append(match_scores(self.task, cls_feats).float())
                rows.append(torch.cat(scores))
        return torch.stack(rows).cpu()

    def _published(self, texts_BLND: Tensor, mask: Tensor, image_PND: Tensor) -> Tensor:
        # The cache holds the layers before their embeddings: adding zeros costs what adding those does.
        texts = texts_BLND.transpose(1, 2) + texts_BLND.new_zeros(texts_BLND.shape[2], 1, texts_BLND.shape[3])
        image = image_PND.transpose(0, 1) + image_PND.new_zeros(image_PND.shape[1], 1, image_PND.shape[2])
        images = image[None].expand(len(texts), -1, -1, -1)
        return fuse_stacks(self.task.model, texts, images, mask)[1]

    def _model(self, texts_BLND: Tensor, mask: Tensor, image_PND: Tensor) -> Tensor:
        texts = list(texts_BLND.unbind(2))
        images = [one.expand(len(mask), -1, -1) for one in image_PND.unbind(1)]
        return self.task.model.fuse_experts(texts, images, mask, pooled_from=0).cls_feats


def compare(
    size: str, precision: Literal["fp32", "bf16"], options: argparse.Namespace, memory: str
) -> list[dict[str, object]]:
    """Times all ways in turns; raises AssertionError if their scores differ."""
    case = Case(size, precision, options.items or ITEMS[size], options.chunks or CHUNKS[size])
    ways = case.ways()
    scores = {name: way() for name, way in ways.items()}
    asked = {name: found != NOT_SCORED for name, found in scores.items()}
    spread = float(scores["published"].std())
    for name, found in scores.items():
        worst = float((found - scores["published"])[asked[name]].abs().max())
        print(
            f"{size} {precision} {name}: largest difference of a score {worst:.1e}, their spread {spread:.1e}"
        )
        assert worst < (1e-4 if precision == "fp32" else 5e-2), name
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    rates = {name: int(asked[name].sum()) / statistics.median(found) for name, found in times.items()}
    rows: list[dict[str, object]] = []
    for name, rate in rates.items():
        ratio = rate / rates["published"]
        print(f"{size} {precision} {name}: {rate:.3g} pairs/s, {ratio:.2f} x published", flush=True)
        rows.append(
            {
                "size": size,
                "precision": precision,
                "way": name,
                "image_tokens": case.images.lengths[0],
                "chunk": case.chunk if name in ("published", "model") else case.config.train.micro_batch_size,
                "pairs_per_s": f"{rate:.4g}",
                "ratio": f"{ratio:.2f}",
                "rounds": options.rounds,
                "memory": memory,
            }
        )
    return rows


def plan() -> None:
    """Prints operations per pair and predicted times at the base size, 384 px."""
    case = Case("base", "fp32", ITEMS["base"], CHUNKS["base"])
    texts, _ = case.padded.padded([0])
    mask, image = case.masks[:1] * 0 + 1, case.images.get(0)
    fusion = PairFusion(case.task.model, torch.float32)
    counts: dict[str, float] = {}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            case._published(texts, mask, image)
        counts["published"] = counter.get_total_flops()
        for name, length in (("ours", 15), ("ours, padded", PADDED)):
            sides = fusion.image(image), fusion.texts(texts[:, :length], mask[:, :length])
            with FlopCounterMode(display=False) as counter:
                fusion(*sides)
            counts[name] = counter.get_total_flops()
    for name, flops in counts.items():
        print(f"{name}: {flops / 1e9:.1f} GFLOP per pair, published / this {counts['published'] / flops:.2f}")
    rate = H200_DENSE_BF16 * ASSUMED_USE
    for name, (images, captions, top_k) in SETS.items():
        for pairs, what in (
            (images * captions, "all pairs"),
            ((images + captions) * top_k, f"top {top_k} both ways"),
        ):
            for way, flops in counts.items():
                hours = pairs * flops / rate / 3600
                print(
                    f"predicted: {name}, {what} ({pairs / 1e6:.1f} M pairs), {way}: {hours:.2f} h on 1 H200, "
                    f"{hours / 8:.2f} h on 8 at {ASSUMED_USE:.0%} of {H200_DENSE_BF16 / 1e12:.0f} TFLOP/s"
                )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument(
        "--items", nargs=2, type=int, metavar=("IMAGES", "TEXTS"), help="scored in a round (default: few)"
    )
    parser.add_argument(
        "--chunks",
        nargs=2,
        type=int,
        metavar=("PUBLISHED", "OURS"),
        help="texts per pass (default: for a CPU)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--system-malloc", action="store_true", help="CPU: let glibc return freed memory")
    parser.add_argument(
        "--plan", action="store_true", help="count operations and predict instead of measuring"
    )
    add_save(parser, "retrieval.csv")
    args = parser.parse_args()
    if args.plan:
        plan()
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    memory = "gpu" if torch.cuda.is_available() else "returned" if args.system_malloc else "kept"
    if memory == "kept":
        keep_freed_memory()
    cases = [(size, one) for size in args.sizes for one in args.precisions]
    rows = [row for case in cases for row in compare(*case, args, memory)]
    if args.save:
        append(args.save, rows)


if __name__ == "__main__":
    main()
