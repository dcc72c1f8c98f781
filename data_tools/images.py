"""Which pictures enter a shard, and with which bytes.

A picture is decoded to its end before it is accepted, and judged by its content, never by its name. The bytes
are stored as they came unless a plain decoder that turns them to RGB would show another picture than the one
meant: then the right one is encoded anew. So whoever reads a shard decodes to RGB and ignores EXIF.
"""

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_PIXELS = 1 << 26
MIN_SIDE = 16
MAX_ASPECT = 20
MAX_FILE_BYTES = 128 << 20

REASONS = {
    "missing_file": "the file is not there (a download that failed)",
    "unreadable_file": "permissions, or a folder or device of that name",
    "empty_file": "the file has no bytes",
    "file_too_large": f"more than {MAX_FILE_BYTES >> 20} MiB",
    "not_an_image": "no known picture format (such as an HTML error page)",
    "too_many_pixels": f"more than {MAX_PIXELS} pixels by its header: refused before decoding",
    "too_small": f"a side shorter than {MIN_SIDE} pixels (such as a tracking pixel)",
    "extreme_aspect": f"one side more than {MAX_ASPECT} times the other",
    "damaged": "the file does not decode to its end: cut short or altered",
    "unsupported_mode": "pixel values whose range is not known (32-bit integer or float)",
}
"""Why a picture is refused."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEG = ("JPEG", "MPO")  # MPO is a JPEG with more pictures behind the first
_STORED = (*_JPEG, "PNG", "WEBP")  # others become PNG
_ORIENTATION = 0x0112
_JPEG_QUALITY = 95


class ImageRefused(Exception):
    """A picture that must not enter a shard: `reason` is a key of `REASONS`, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """An accepted picture.

    Attributes:
        data: Encoded bytes to store.
        width: Pixels, of the picture as it decodes.
        height: Pixels.
        change: Why it was encoded anew, such as "cmyk"; empty if `data` are the source's bytes.
    """

    data: bytes
    width: int
    height: int
    change: str = ""


def check_image(data: bytes) -> Picture:
    """Decides on one encoded picture.

    Raises:
        ImageRefused: With the reason.
    """
    if not data:
        raise ImageRefused("empty_file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and large pictures only warn; both are judged here
        image = _open(data)
        if image.format not in _JPEG:
            _load(image)
        if image.format == "PNG":
            _check_png(data)
        change = _needed_change(image, data)
        size = image.size
        if image.format in _JPEG:
            if not change:  # all of the data is read at an eighth of the size too, only faster
                image.draft("RGB", (1, 1))
            _load(image)
            _check_jpeg(image, data)
        if not change:
            return Picture(data, *size)
        upright = _upright_rgb(image)
    buffer = io.BytesIO()
    if image.format in _JPEG:
        upright.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        upright.save(buffer, "PNG")
    return Picture(buffer.getvalue(), *upright.size, change)


def decode_rgb(data: bytes) -> Image.Image:
    """The RGB picture that stored bytes show.

    Raises:
        ImageRefused: They are not a whole picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        _load(image)
        return image.convert("RGB")


def _open(data: bytes) -> Image.Image:
    """Reads the header and refuses what must not be decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused("too_many_pixels", str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise ImageRefused("not_an_image", f"begins with {data[:16]!r}") from error
    except MemoryError:
        raise
    except Exception as error:  # hostile headers make decoders raise anything
        raise ImageRefused("damaged", f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageRefused("too_many_pixels", f"{width} x {height}")
    if min(width, height) < MIN_SIDE:
        raise ImageRefused("too_small", f"{width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRefused("extreme_aspect", f"{width} x {height}")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged data make decoders raise anything
        raise ImageRefused("damaged", f"{type(error).__name__}: {error}") from error


def _needed_change(image: Image.Image, data: bytes) -> str:
    """Why a plain RGB decoder would show another picture than the one meant; empty if it would not."""
    if _orientation(image) != 1:
        return "orientation"
    if image.format not in _STORED:
        return str(image.format).lower()
    if image.format not in _JPEG and getattr(image, "n_frames", 1) > 1:
        return "animation"
    if _has_alpha(image):
        return "alpha"
    if image.mode.startswith("I;16") or (image.format == "PNG" and data[24] == 16):
        return "16_bit"
    if image.mode not in ("RGB", "L", "P", "1"):
        return image.mode.lower()
    return ""


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the block is broken: the pixels are fine."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # the parser raises anything on a broken block
        return 1
    return value if value in range(1, 9) else 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The picture meant, of a loaded image: first frame, 8 bit, on white, upright, RGB."""
    orientation = _orientation(image)
    result: Image.Image = image
    if image.mode.startswith("I;16"):
        result = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageRefused("unsupported_mode", image.mode)
    if _has_alpha(image):
        layer = result.convert("RGBA")
        result = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        result.alpha_composite(layer)
    result = result.convert("RGB")
    return result.transpose(_TURNS[orientation]) if orientation != 1 else result


def _check_png(data: bytes) -> None:
    """Compares the checksum of every chunk, which decoding alone does not."""
    try:
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    except MemoryError:
        raise
    except Exception as error:
        raise ImageRefused("damaged", f"{type(error).__name__}: {error}") from error


# Decoders pass over two faults of a JPEG without an error. What a cut-off scan with an end mark put behind it
# lacks becomes grey; and a progressive file may end after any scan, with detail missing.

_GREY = ((128, 128, 128), 128)
_END = b"\xff\xd9"
_FILLER = b"\x55" * 2048


def _check_jpeg(image: Image.Image, data: bytes) -> None:
    """Refuses a JPEG that decodes without an error although data are missing."""
    if image.info.get("progressive") or image.info.get("progression"):
        if not _all_scans_there(data):
            raise ImageRefused("damaged", "progressive JPEG without its last scans")
        return
    width, height = image.size
    if image.getpixel((width - 1, height - 1)) not in _GREY or not data.rstrip(b"\0").endswith(_END):
        return
    # The last corner is the decoder's grey, or a grey picture. A whole scan does not care what follows it.
    end = data.rindex(_END)
    longer = Image.open(io.BytesIO(data[:end] + _FILLER + _END), formats=("JPEG",))
    if longer.size != image.size:  # compared at the size that was decoded
        longer.draft("RGB", (1, 1))
    _load(longer)
    if longer.tobytes() != image.tobytes():
        raise ImageRefused("damaged", "JPEG cut short with an end mark put behind it")


_SCAN_OR_END = re.compile(rb"\xff([\xc0-\xcf\xda\xd9])")


def _all_scans_there(data: bytes) -> bool:
    """Whether the scans of a progressive JPEG bring all coefficients of all components to full precision."""
    wanted: set[tuple[int, int]] = set()
    position = 2
    while (found := _SCAN_OR_END.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == 0xD9:
            break
        if marker in (0xC4, 0xC8, 0xCC) or len(data) < position + 2:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        part = data[position + 2 : position + length]
        if marker == 0xDA:
            if len(part) < 4 or len(part) < 4 + 2 * part[0]:
                return False
            first, last, low = part[-3], part[-2], part[-1] & 15
            if low == 0:
                components = part[1 : 1 + 2 * part[0] : 2]
                wanted -= {(c, k) for c in components for k in range(first, last + 1)}
            position += length
        elif not wanted:
            wanted = {(part[6 + 3 * i], k) for i in range(part[5]) for k in range(64)}
            position += length
    return not wanted
