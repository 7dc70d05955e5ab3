# mypy: ignore-errors
"""Triton kernels on channels-last volumes; import only where Triton is installed. `trainables.network.batchnorm` calls them.

A tensor (N, C, D, H, W) in channels-last memory is a matrix of N * D * H * W rows and C columns. `rows` are those of one
group (a micro-batch); groups follow one another. All arithmetic is float32, whatever the tensors hold.
"""

import triton
import triton.language as tl


@triton.jit
def moments(
    x, partial, rows, C, per_split, splits, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of (x - x_0) and of its square over each split of each group: partial (G, splits, 2, C).

    Shifted by the group's first row: the plain difference of E[x^2] and E[x]^2 cancels where the mean is large.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    group = tl.program_id(2)
    base = group.to(tl.int64) * rows
    in_c = c < C
    shift = tl.load(x + base * C + c, mask=in_c, other=0.0).to(tl.float32)
    start = split * per_split
    end = tl.minimum(start + per_split, rows)
    s = tl.zeros([BM, BC], dtype=tl.float32)
    q = tl.zeros([BM, BC], dtype=tl.float32)
    for r in tl.range(start, end, BM, num_stages=STAGES):
        row = r + tl.arange(0, BM)
        mask = (row < end)[:, None] & in_c[None, :]
        v = tl.load(x + (base + row)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v - shift[None, :], 0.0)
        s += v
        q += v * v
    out = partial + ((group * splits + split) * 2) * C + c
    tl.store(out, tl.sum(s, axis=0), mask=in_c)
    tl.store(out + C, tl.sum(q, axis=0), mask=in_c)


@triton.jit
def finish_moments(
    x, partial, mean, rstd, running_mean, running_var, rows, C, splits, groups, momentum, eps,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Means and reciprocal deviations (G, C); running statistics take the groups one after the other."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    run_mean = tl.load(running_mean + c, mask=in_c, other=0.0)
    run_var = tl.load(running_var + c, mask=in_c, other=0.0)
    for group in range(groups):
        s = tl.zeros([BS, BC], dtype=tl.float32)
        q = tl.zeros([BS, BC], dtype=tl.float32)
        for first in range(0, splits, BS):
            split = first + tl.arange(0, BS)
            mask = (split < splits)[:, None] & in_c[None, :]
            at = partial + ((group * splits + split) * 2)[:, None] * C + c[None, :]
            s += tl.load(at, mask=mask, other=0.0)
            q += tl.load(at + C, mask=mask, other=0.0)
        base = tl.full([], group, tl.int64) * rows
        shift = tl.load(x + base * C + c, mask=in_c, other=0.0).to(tl.float32)
        delta = tl.sum(s, axis=0) / rows
        m = shift + delta
        v = tl.maximum(tl.sum(q, axis=0) / rows - delta * delta, 0.0)
        tl.store(mean + group * C + c, m, mask=in_c)
        tl.store(rstd + group * C + c, 1.0 / tl.sqrt(v + eps), mask=in_c)
        run_mean += momentum * (m - run_mean)
        run_var += momentum * (v * (rows / (rows - 1.0)) - run_var)
    tl.store(running_mean + c, run_mean, mask=in_c)
    tl.store(running_var + c, run_var, mask=in_c)


@triton.jit
def normalise(
    x, residual, y, mean, rstd, weight, bias, rows, C,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * rstd * weight + bias + residual)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    group = tl.program_id(2)
    in_c = c < C
    mask = (row < rows)[:, None] & in_c[None, :]
    at = (group.to(tl.int64) * rows + row)[:, None] * C + c[None, :]
    m = tl.load(mean + group * C + c, mask=in_c, other=0.0)
    r = tl.load(rstd + group * C + c, mask=in_c, other=0.0)
    w = tl.load(weight + c, mask=in_c, other=0.0)
    b = tl.load(bias + c, mask=in_c, other=0.0)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    z = (v - m[None, :]) * r[None, :] * w[None, :] + b[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        z = tl.where(z < 0.0, 0.0, z)  # keeps NaN, as torch does
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_sums(
    dy, x, y, dz, partial, mean, rstd, weight, bias, rows, C, per_split, splits,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * x_hat over each split of each group; with a residual, dz itself, which is its gradient.

    Without a residual the sign of the output is recomputed from x: a third of the bytes less.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    group = tl.program_id(2)
    base = group.to(tl.int64) * rows
    in_c = c < C
    m = tl.load(mean + group * C + c, mask=in_c, other=0.0)
    r = tl.load(rstd + group * C + c, mask=in_c, other=0.0)
    w = tl.load(weight + c, mask=in_c, other=0.0)
    b = tl.load(bias + c, mask=in_c, other=0.0)
    start = split * per_split
    end = tl.minimum(start + per_split, rows)
    s = tl.zeros([BM, BC], dtype=tl.float32)
    q = tl.zeros([BM, BC], dtype=tl.float32)
    for first in tl.range(start, end, BM, num_stages=STAGES):
        row = first + tl.arange(0, BM)
        mask = (row < end)[:, None] & in_c[None, :]
        at = (base + row)[:, None] * C + c[None, :]
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        hat = (v - m[None, :]) * r[None, :]
        if RELU:
            if HAS_RESIDUAL:
                g = tl.where(tl.load(y + at, mask=mask, other=0.0) > 0.0, g, 0.0)
            else:
                g = tl.where(hat * w[None, :] + b[None, :] > 0.0, g, 0.0)
        if HAS_RESIDUAL:
            tl.store(dz + at, g.to(dz.dtype.element_ty), mask=mask)
        s += g
        q += tl.where(mask, g * hat, 0.0)
    out = partial + ((group * splits + split) * 2) * C + c
    tl.store(out, tl.sum(s, axis=0), mask=in_c)
    tl.store(out + C, tl.sum(q, axis=0), mask=in_c)


@triton.jit
def finish_backward(
    partial, sums, dweight, dbias, C, splits, groups, BS: tl.constexpr, BC: tl.constexpr
):
    """Sums over the splits (G, 2, C), and over the groups: the gradients of weight and bias."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = c < C
    dw = tl.zeros([BC], dtype=tl.float32)
    db = tl.zeros([BC], dtype=tl.float32)
    for group in range(groups):
        s = tl.zeros([BS, BC], dtype=tl.float32)
        q = tl.zeros([BS, BC], dtype=tl.float32)
        for first in range(0, splits, BS):
            split = first + tl.arange(0, BS)
            mask = (split < splits)[:, None] & in_c[None, :]
            at = partial + ((group * splits + split) * 2)[:, None] * C + c[None, :]
            s += tl.load(at, mask=mask, other=0.0)
            q += tl.load(at + C, mask=mask, other=0.0)
        ss = tl.sum(s, axis=0)
        qq = tl.sum(q, axis=0)
        tl.store(sums + group * 2 * C + c, ss, mask=in_c)
        tl.store(sums + group * 2 * C + C + c, qq, mask=in_c)
        db += ss
        dw += qq
    tl.store(dweight + c, dw, mask=in_c)
    tl.store(dbias + c, db, mask=in_c)


@triton.jit
def backward_apply(
    dy, x, dx, sums, mean, rstd, weight, bias, rows, C,
    RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = weight * rstd * (dz - mean(dz) - x_hat * mean(dz * x_hat)); `dy` is dz already unless RELU."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    group = tl.program_id(2)
    in_c = c < C
    mask = (row < rows)[:, None] & in_c[None, :]
    at = (group.to(tl.int64) * rows + row)[:, None] * C + c[None, :]
    m = tl.load(mean + group * C + c, mask=in_c, other=0.0)
    r = tl.load(rstd + group * C + c, mask=in_c, other=0.0)
    w = tl.load(weight + c, mask=in_c, other=0.0)
    s = tl.load(sums + group * 2 * C + c, mask=in_c, other=0.0) / rows
    q = tl.load(sums + group * 2 * C + C + c, mask=in_c, other=0.0) / rows
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    hat = (v - m[None, :]) * r[None, :]
    if RELU:
        b = tl.load(bias + c, mask=in_c, other=0.0)
        g = tl.where(hat * w[None, :] + b[None, :] > 0.0, g, 0.0)
    d = (w * r)[None, :] * (g - s[None, :] - hat * q[None, :])
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def max_pool(x, y, taken, count, D, H, W, OD, OH, OW, C, BM: tl.constexpr, BC: tl.constexpr):
    """3x3x3 max-pool of stride 2 and padding 1; `taken` (uint8) holds which of the 27 voxels it was."""
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_o = o < count
    in_c = c < C
    ow = o % OW
    oh = (o // OW) % OH
    od = (o // (OW * OH)) % OD
    n = (o // (OW * OH * OD)).to(tl.int64)
    best = tl.full([BM, BC], float("-inf"), dtype=tl.float32)
    which = tl.zeros([BM, BC], dtype=tl.int32)
    for k in tl.static_range(27):
        d = 2 * od - 1 + k // 9
        h = 2 * oh - 1 + (k // 3) % 3
        w = 2 * ow - 1 + k % 3
        inside = in_o & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = ((n * D + d) * H + h) * W + w
        v = tl.load(
            x + at[:, None] * C + c[None, :],
            mask=inside[:, None] & in_c[None, :],
            other=float("-inf"),
        )
        v = v.to(tl.float32)
        better = (v > best) | (v != v)
        best = tl.where(better, v, best)
        which = tl.where(better, k, which)
    out = o.to(tl.int64)[:, None] * C + c[None, :]
    mask = in_o[:, None] & in_c[None, :]
    tl.store(y + out, best.to(y.dtype.element_ty), mask=mask)
    tl.store(taken + out, which.to(tl.uint8), mask=mask)


@triton.jit
def max_pool_backward(
    dy, taken, dx, count, D, H, W, OD, OH, OW, C, BM: tl.constexpr, BC: tl.constexpr
):
    """Each input voxel gathers from the windows (at most eight) that it is in: no atomics, so always the same sum."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_i = i < count
    in_c = c < C
    w = i % W
    h = (i // W) % H
    d = (i // (W * H)) % D
    n = (i // (W * H * D)).to(tl.int64)
    total = tl.zeros([BM, BC], dtype=tl.float32)
    for k in tl.static_range(8):
        od = d // 2 + k // 4
        oh = h // 2 + (k // 2) % 2
        ow = w // 2 + k % 2
        kd = d + 1 - 2 * od
        kh = h + 1 - 2 * oh
        kw = w + 1 - 2 * ow
        inside = in_i & (kd >= 0) & (kh >= 0) & (kw >= 0) & (od < OD) & (oh < OH) & (ow < OW)
        at = (((n * OD + od) * OH + oh) * OW + ow)[:, None] * C + c[None, :]
        mask = inside[:, None] & in_c[None, :]
        which = tl.load(taken + at, mask=mask, other=255).to(tl.int32)
        hit = mask & (which == (kd * 9 + kh * 3 + kw)[:, None])
        total += tl.load(dy + at, mask=hit, other=0.0).to(tl.float32)
    at = i.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=in_i[:, None] & in_c[None, :])
