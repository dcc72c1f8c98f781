"""The Triton kernels of manager aggregation; `triton_impl` calls them.

A program holds a tile of whole tokens, `[rows, D]`, in registers: the layer norms' sums over channels need no
second pass over memory. The softmax over experts is computed as they stream by (running maximum and sum), so
registers do not grow with N. Backward makes two passes over a tile's experts (the second reads the cache): the
mixture first, then the gradients. Gradients of parameters are summed without atomics: each program adds its
tiles, in order, to rows of its own, and these are summed afterwards.
"""

import triton
import triton.language as tl

from mt_deepspeed.kernels.manager_aggregation.triton_math import exp2, normals

_LOG2E = tl.constexpr(1.4426950408889634)
# Else Triton compiles anew where one of these becomes 1 or a multiple of 16: up to a minute for the backward kernel.
_VARYING = ["tokens", "offset", "programs"]


@triton.jit
def _moments(x, mask, size, eps):
    """Mean and inverse deviation of each row."""
    mean = tl.sum(x, axis=1) / size
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / size + eps)


@triton.jit
def _score(
    i: tl.constexpr,
    rows,
    columns,
    mask,
    inside,
    logits,
    noise,
    seed,
    offset,
    noise_scale,
    scale,
    tokens,
    size: tl.constexpr,
    N: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(logit + noise) x scale of expert i, `[rows, 1 or BLOCK]` or `[1, BLOCK]`."""
    if ADAPTIVE:
        score = tl.load(logits + rows * N + i, mask=inside, other=0.0)[:, None]
    else:
        score = tl.load(logits + i * size + columns, mask=columns < size, other=0.0)[None, :]
    if NOISE == 1:
        at = (i * tokens + rows)[:, None] * size + columns[None, :]
        score = score + tl.load(noise + at, mask=mask, other=0.0).to(tl.float32)
    if NOISE == 2:
        score = score + noise_scale * normals(seed, offset, i, rows, BLOCK)
    return score * scale


@triton.jit(do_not_specialize=_VARYING)
def statistics_kernel(
    states,
    out,
    tokens,
    size: tl.constexpr,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile per program; `out` is `[2, N, T]`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = rows < tokens
    mask = inside[:, None] & (columns < size)[None, :]
    for i in tl.static_range(N):
        x = tl.load(states[i] + rows[:, None] * size + columns[None, :], mask=mask, other=0.0)
        mean, inverse = _moments(x.to(tl.float32), mask, size, eps)
        tl.store(out + i * tokens + rows, mean, mask=inside)
        tl.store(out + (N + i) * tokens + rows, inverse, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    experts,
    previous,
    statistics,
    norm_weight,
    norm_bias,
    logits,
    temperature,
    previous_weight,
    noise,
    seed,
    offset,
    noise_scale,
    out,
    previous_statistics,
    tokens,
    size: tl.constexpr,
    eps,
    N: tl.constexpr,
    P: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile per program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = rows < tokens
    present = columns < size
    mask = inside[:, None] & present[None, :]
    at = rows[:, None] * size + columns[None, :]
    scale = _LOG2E / tl.load(temperature)  # powers of 2 make the softmax
    seed_value = tl.load(seed)

    largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(N):
        x = tl.load(experts[i] + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics + i * tokens + rows, mask=inside, other=0.0)
        inverse = tl.load(statistics + (N + i) * tokens + rows, mask=inside, other=0.0)
        gain = tl.load(norm_weight + i * size + columns, mask=present, other=0.0)
        bias = tl.load(norm_bias + i * size + columns, mask=present, other=0.0)
        normed = (x - mean[:, None]) * inverse[:, None] * gain[None, :] + bias[None, :]
        score = _score(
            i, rows, columns, mask, inside, logits, noise, seed_value, offset, noise_scale,
            scale, tokens, size, N, ADAPTIVE, NOISE, BLOCK,
        )  # fmt: skip
        larger = tl.maximum(largest, score)
        decay = exp2(largest - larger)
        weight = exp2(score - larger)
        weight_sum = weight_sum * decay + weight
        total = total * decay + weight * normed
        largest = larger
    total = total / weight_sum

    for j in tl.static_range(P):
        x = tl.load(previous[j] + at, mask=mask, other=0.0).to(tl.float32)
        mean, inverse = _moments(x, mask, size, eps)
        tl.store(previous_statistics + j * tokens + rows, mean, mask=inside)
        tl.store(previous_statistics + (P + j) * tokens + rows, inverse, mask=inside)
        gain = tl.load(norm_weight + (N + j) * size + columns, mask=present, other=0.0)
        bias = tl.load(norm_bias + (N + j) * size + columns, mask=present, other=0.0)
        weight = tl.load(previous_weight + j * size + columns, mask=present, other=0.0)
        normed = (x - mean[:, None]) * inverse[:, None] * gain[None, :] + bias[None, :]
        total += weight[None, :] * normed
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(to, value, present):
    """Adds a tile's sum over its rows to this program's own row."""
    tl.store(to, tl.load(to, mask=present, other=0.0) + tl.sum(value, axis=0), mask=present)


@triton.jit
def _state_gradient(standard, normed_grad, gain, inverse, size):
    """Gradient of a layer norm's input."""
    inner = normed_grad * gain[None, :]
    mean = tl.sum(inner, axis=1) / size
    along = tl.sum(inner * standard, axis=1) / size
    return (inner - mean[:, None] - standard * along[:, None]) * inverse[:, None]


@triton.jit(do_not_specialize=_VARYING)
def backward_kernel(
    experts,
    previous,
    statistics,
    norm_weight,
    norm_bias,
    logits,
    temperature,
    previous_weight,
    noise,
    seed,
    offset,
    noise_scale,
    previous_statistics,
    grad,
    state_grads,
    logits_grad,
    partial,
    partial_temperature,
    tokens,
    size: tl.constexpr,
    programs,
    N: tl.constexpr,
    P: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tiles `program`, `program + programs`, ...; `partial` is `[programs, 3, N + P, D]` of zeros."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    present = columns < size
    inverse_temperature = 1.0 / tl.load(temperature)
    scale = _LOG2E * inverse_temperature  # powers of 2 make the softmax
    seed_value = tl.load(seed)
    plane = (N + P) * size
    own = partial + program * 3 * plane + columns
    temperature_sum = 0.0

    for tile in range(program, tl.cdiv(tokens, ROWS), programs):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = rows < tokens
        mask = inside[:, None] & present[None, :]
        at = rows[:, None] * size + columns[None, :]
        out_grad = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)

        largest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
        weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        mixed = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(N):
            x = tl.load(experts[i] + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(statistics + i * tokens + rows, mask=inside, other=0.0)
            inverse = tl.load(statistics + (N + i) * tokens + rows, mask=inside, other=0.0)
            gain = tl.load(norm_weight + i * size + columns, mask=present, other=0.0)
            bias = tl.load(norm_bias + i * size + columns, mask=present, other=0.0)
            normed = (x - mean[:, None]) * inverse[:, None] * gain[None, :] + bias[None, :]
            score = _score(
                i, rows, columns, mask, inside, logits, noise, seed_value, offset, noise_scale,
                scale, tokens, size, N, ADAPTIVE, NOISE, BLOCK,
            )  # fmt: skip
            larger = tl.maximum(largest, score)
            decay = exp2(largest - larger)
            weight = exp2(score - larger)
            weight_sum = weight_sum * decay + weight
            mixed = mixed * decay + weight * normed
            largest = larger
        mixed = mixed / weight_sum

        for i in tl.static_range(N):
            x = tl.load(experts[i] + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(statistics + i * tokens + rows, mask=inside, other=0.0)
            inverse = tl.load(statistics + (N + i) * tokens + rows, mask=inside, other=0.0)
            gain = tl.load(norm_weight + i * size + columns, mask=present, other=0.0)
            bias = tl.load(norm_bias + i * size + columns, mask=present, other=0.0)
            standard = tl.where(mask, (x - mean[:, None]) * inverse[:, None], 0.0)
            normed = standard * gain[None, :] + bias[None, :]
            score = _score(
                i, rows, columns, mask, inside, logits, noise, seed_value, offset, noise_scale,
                scale, tokens, size, N, ADAPTIVE, NOISE, BLOCK,
            )  # fmt: skip
            normed_grad = exp2(score - largest) / weight_sum * out_grad
            score_grad = normed_grad * (normed - mixed)
            temperature_sum -= tl.sum(tl.sum(score_grad * score, axis=1), axis=0)
            _add(own + i * size, normed_grad * standard, present)
            _add(own + plane + i * size, normed_grad, present)
            if ADAPTIVE:
                token_grad = tl.sum(score_grad, axis=1) * inverse_temperature
                tl.store(logits_grad + rows * N + i, token_grad, mask=inside)
            else:
                _add(own + 2 * plane + i * size, score_grad * inverse_temperature, present)
            state_grad = _state_gradient(standard, normed_grad, gain, inverse, size)
            tl.store(state_grads[i] + at, state_grad.to(grad.dtype.element_ty), mask=mask)

        for j in tl.static_range(P):
            x = tl.load(previous[j] + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(previous_statistics + j * tokens + rows, mask=inside, other=0.0)
            inverse = tl.load(previous_statistics + (P + j) * tokens + rows, mask=inside, other=0.0)
            gain = tl.load(norm_weight + (N + j) * size + columns, mask=present, other=0.0)
            bias = tl.load(norm_bias + (N + j) * size + columns, mask=present, other=0.0)
            weight = tl.load(previous_weight + j * size + columns, mask=present, other=0.0)
            standard = tl.where(mask, (x - mean[:, None]) * inverse[:, None], 0.0)
            normed_grad = weight[None, :] * out_grad
            _add(own + (N + j) * size, normed_grad * standard, present)
            _add(own + plane + (N + j) * size, normed_grad, present)
            weight_grad = out_grad * (standard * gain[None, :] + bias[None, :])
            _add(own + 2 * plane + (N + j) * size, weight_grad, present)
            state_grad = _state_gradient(standard, normed_grad, gain, inverse, size)
            tl.store(state_grads[N + j] + at, state_grad.to(grad.dtype.element_ty), mask=mask)
    tl.store(partial_temperature + program, temperature_sum * inverse_temperature / _LOG2E)
