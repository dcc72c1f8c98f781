"""Writes worlds to disk with many processes; the bytes depend on (layout, seed, number, size) alone."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from data_tools.files import write_atomically
from data_tools.lock import folder_lock
from data_tools.options import BadOption
from data_tools.pool import map_in_order
from data_tools.synthetic.draw import Draw
from data_tools.synthetic.layout import HELD_OUT, Record
from data_tools.synthetic.layouts import LAYOUTS
from data_tools.synthetic.lexicon import visual_words
from data_tools.synthetic.world import MIN_IMAGE_SIZE, Scene, render, sample_scene

WORLD_VERSION = 2
"""Raised when the same options give other bytes than before."""

JPEG_QUALITY = 95
CHUNK = 64  # pictures a task: large enough to hide the cost of passing it, small enough to share out
_DONE_NAME = "synth.json"

Report = Callable[[str, int, int], None]
"""Told (layout, pictures done, pictures in all)."""


def scene_of(layout: str, seed: int, number: int) -> Scene:
    """The scene of picture `number`; each layout shows other scenes."""
    return sample_scene(Draw("scene", layout, seed, number))


def write_worlds(
    out: Path,
    layouts: list[str],
    num_images: int,
    seed: int,
    image_size: int = 64,
    workers: int = 1,
    report: Report | None = None,
) -> None:
    """Writes `num_images` pictures (or pairs) per layout below `out`/<layout>, and `out`/visual_words.json.

    A layout that is complete with the same options is left as it is; one with fewer pictures of the same
    world is extended.

    Raises:
        BadOption: Unknown layout or impossible number.
        ValueError: A folder that holds another world or is being
            written by another run.
    """
    for layout in layouts:
        if layout not in LAYOUTS:
            raise BadOption(f"layout {layout!r}: expected one of {list(LAYOUTS)}")
    if num_images < 1 or workers < 1:
        raise BadOption(f"--num-images {num_images}, --workers {workers}: both must be at least 1")
    if image_size < MIN_IMAGE_SIZE:
        raise BadOption(f"--image-size {image_size}: expected at least {MIN_IMAGE_SIZE}")
    wanted = {"world_version": WORLD_VERSION, "seed": seed, "image_size": image_size}
    missing = [layout for layout in layouts if not _is_complete(out / layout, num_images, wanted)]
    out.mkdir(parents=True, exist_ok=True)
    words = json.dumps(visual_words(), indent=1) + "\n"
    write_atomically(out / "visual_words.json", words.encode("utf-8"))
    for layout in missing:
        (out / layout).mkdir(exist_ok=True)
        with folder_lock(out / layout):
            (out / layout / _DONE_NAME).unlink(missing_ok=True)
            _write_world(out / layout, layout, num_images, seed, image_size, workers, report)
            done = json.dumps({**wanted, "layout": layout, "num_images": num_images}, indent=1) + "\n"
            write_atomically(out / layout / _DONE_NAME, done.encode("utf-8"))


def _is_complete(folder: Path, num_images: int, wanted: dict[str, int]) -> bool:
    """Whether `folder` holds this very world; False if it is to be written or extended."""
    path = folder / _DONE_NAME
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; expected a folder or nothing")
        return False
    done = json.loads(path.read_text("utf-8"))
    there = {key: done.get(key) for key in wanted}
    if there != wanted or done["num_images"] > num_images:
        raise ValueError(
            f"{folder}: holds another world ({done['num_images']} pictures, {there}); asked for {num_images} "
            f"pictures, {wanted}. Choose another --out or remove the folder"
        )
    return bool(done["num_images"] == num_images)


def _write_world(
    folder: Path,
    layout: str,
    num_images: int,
    seed: int,
    image_size: int,
    workers: int,
    report: Report | None,
) -> None:
    first = range(min(num_images, 100 * HELD_OUT))  # enough to meet every folder
    for name in {path.rsplit("/", 1)[0] for index in first for path in LAYOUTS[layout].pictures(index)}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    tasks = [
        (folder, layout, seed, image_size, start, min(start + CHUNK, num_images))
        for start in range(0, num_images, CHUNK)
    ]

    def records() -> Iterator[Record]:
        done = 0
        for chunk in map_in_order(_write_chunk, tasks, workers):
            yield from chunk
            done += len(chunk)
            if report is not None:
                report(layout, done, num_images)

    LAYOUTS[layout].write(folder, records())


def _write_chunk(task: tuple[Path, str, int, int, int, int]) -> list[Record]:
    """Writes pictures [start, stop) and returns their records."""
    folder, name, seed, image_size, start, stop = task
    layout = LAYOUTS[name]
    records = []
    for index in range(start, stop):
        paths = layout.pictures(index)
        scenes = [scene_of(name, seed, index * len(paths) + number) for number in range(len(paths))]
        for path, scene in zip(paths, scenes, strict=True):
            (folder / path).write_bytes(encode(scene, image_size))
        records.append(layout.describe(index, scenes, Draw("text", name, seed, index), image_size))
    return records


def encode(scene: Scene, image_size: int) -> bytes:
    """The picture as JPEG, colours at full resolution (4:4:4)."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, image_size)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
