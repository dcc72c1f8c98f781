"""Functions of the hardware itself for Triton's kernels, and the noise that is made with them.

What `tl` makes of the same names minds denormal numbers and wide ranges, which takes several times the instructions.
"""

# Triton compiles these functions itself: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def exp2(x):
    """2^x."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def log2(x):
    """Logarithm to base 2."""
    if _INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def sqrt(x):
    """Square root."""
    if _INTERPRETED:
        return tl.sqrt(x)
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def cos(x):
    """Between -pi and pi, where it is exact to 2^-21."""
    if _INTERPRETED:
        return tl.cos(x)
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def sin(x):
    """Between -pi and pi, where it is exact to 2^-21."""
    if _INTERPRETED:
        return tl.sin(x)
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def normals(seed, offset, expert: tl.constexpr, rows, BLOCK: tl.constexpr):
    """`noise.philox_normal` of a tile: one Philox block for 8 channels."""
    blocks = tl.arange(0, BLOCK // 8)[None, :].to(tl.uint32)
    tokens = rows[:, None].to(tl.uint32)
    zero = blocks * 0 + tokens * 0
    w0, w1, w2, w3 = tl.philox(
        seed, tokens + zero, zero + expert, blocks + zero, (zero + offset).to(tl.uint32)
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((words & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536.0)
    radius = -sqrt(-1.3862943611198906 * log2(uniform))  # negative, since the angle is half a turn less
    angle = ((words >> 16).to(tl.float32) - 32767.5) * (6.283185307179586 / 65536.0)
    return tl.interleave(radius * cos(angle), radius * sin(angle))
