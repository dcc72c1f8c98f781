"""The managers' noise: normals from Philox 4x32-10 (Salmon et al., SC 2011), made where they are used.

One Philox block (128 bits) gives the normals of 8 neighbouring channels of one token and expert, so that a
kernel's thread with 16 bytes of bfloat16 needs one block and no state:

    key = (seed low, seed high), counter = (token, expert, channel // 8, offset)
    word j, j = 0..3:  r = sqrt(-2 ln((low 16 bits + 1/2) / 2^16)),  phi = 2 pi (high 16 bits + 1/2) / 2^16
    channel 8 c + 2 j:  r cos(phi);   channel 8 c + 2 j + 1:  r sin(phi)

16 bits of radius bound the normals by 4.86 standard deviations (one in 800 000 would lie beyond) and make
the variance 1 - 5e-6. Integers are the same everywhere; the floating-point part is rounded by each backend.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Philox(NamedTuple):
    """Noise that is made inside of the operator and again in its backward."""

    seed: Tensor
    """`[1]` int64, on the device of the experts: reading it there needs no synchronisation."""
    offset: int
    """Separates streams of one seed, 0 to 2^32 - 1; the managers use their layer."""
    scale: float
    """Standard deviation."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words (they broadcast); returns four such."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products' 64 bits are right although int64 takes the highest for a sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) ^ c1 ^ k0) & _MASK,
            product1 & _MASK,
            ((product0 >> 32) ^ c3 ^ k1) & _MASK,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def philox_normal(
    seed: Tensor,
    offset: int,
    num_experts: int,
    num_tokens: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    first_expert: int = 0,
) -> Tensor:
    """The standard normals that every backend uses.

    Args:
        seed: `[1]` int64; the result lies on its device.
        offset: See `Philox`.
        num_experts: N.
        num_tokens: T.
        size: D; what does not fill the last 8 channels is cut off.
        dtype: float32 or float64, used from the integers on.
        first_expert: Makes experts `first_expert` to `first_expert + N - 1`.

    Returns:
        `[N, T, D]`.
    """
    if not 0 <= offset <= _MASK:
        raise ValueError(f"philox_normal: found offset {offset}, expected 0 to 2^32 - 1")
    device, blocks = seed.device, -(-size // 8)
    expert = torch.arange(first_expert, first_expert + num_experts, device=device)[:, None, None]
    token = torch.arange(num_tokens, device=device)[None, :, None]
    block = torch.arange(blocks, device=device)[None, None, :]
    counter = (token, expert, block, torch.full_like(seed, offset))
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [N, T, blocks, 4]
    radius = (((bits & 0xFFFF).to(dtype) + 0.5) / 65536).log_().mul_(-2).sqrt_()
    angle = ((bits >> 16).to(dtype) + 0.5) * (2 * math.pi / 65536)
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.reshape(num_experts, num_tokens, blocks * 8)[..., :size]
