"""The method in float64 and plain loops, written from its description alone and not from `wanjax`.

Branches are lists [text, image 1, ... image M] of [B, K, N, D] arrays. Axis letters as in `wanjax`: B batch, F latent
frames, S queries (F equal frames, one after the other), K keys, N heads, D head width, A anchors: sorted
latent frames, by default the first and the last.
"""

import math

import numpy as np


def around(i, frames, anchors):
    """Positions of the anchors before and after frame i, None for none; the last one comes after itself."""
    before = [a for a in range(len(anchors)) if anchors[a] <= i]
    after = [a for a in range(len(anchors)) if anchors[a] > i]
    if not after and before and i == anchors[-1] and len(anchors) > 1:
        return before[-2], before[-1]
    return (before[-1] if before else None), (after[0] if after else None)


def strength(steps, layers, frames, window, strength_end=0.7, strength_mid=0.3, low=0.0, high=0.4, anchors=None):
    """[steps, layers, F]; `window` is the first and the last active layer."""
    anchors = (0, frames - 1) if anchors is None else anchors
    out = np.zeros((steps, layers, frames))
    for i in range(frames):
        if i in anchors:
            continue
        before, after = around(i, frames, anchors)
        if before is None:
            nearest, longest = anchors[after] - i, anchors[after]
        elif after is None:
            nearest, longest = i - anchors[before], frames - 1 - anchors[before]
        else:
            nearest, longest = min(i - anchors[before], anchors[after] - i), (anchors[after] - anchors[before]) // 2
        u = 1 - nearest / max(1, longest)
        u = (1 + math.cos(math.pi * (1 - u))) / 2
        for step in range(steps):
            for layer in range(layers):
                if low < step / steps <= high and window[0] <= layer <= window[1]:
                    out[step, layer, i] = strength_mid + (strength_end - strength_mid) * u
    return out


def anchor_curve(frames, anchors=None, curve=None):
    """Part of each anchor in each frame's target, [F, A]; curve [F] is that of the following one (default linear)."""
    anchors = (0, frames - 1) if anchors is None else anchors
    out = np.zeros((frames, len(anchors)))
    for i in range(frames):
        before, after = around(i, frames, anchors)
        if before is None or after is None:
            out[i, after if before is None else before] = 1
        else:
            t = (i - anchors[before]) / (anchors[after] - anchors[before]) if curve is None else curve[i]
            out[i, before], out[i, after] = 1 - t, t
    return out


def scale_vector(frames, latent_frames, width, s_edge=1.06, s_mid=0.94, smooth=2, anchors=None):
    """ReTRo's s [F]; `width` of an edge in pixel frames."""
    ratio = round(width / frames, 6)
    raw = []
    for i in range(latent_frames):
        t = i / (latent_frames - 1)
        near = t < ratio or t >= 1 - ratio
        if anchors is not None:
            near = any(a / (latent_frames - 1) - ratio <= t < a / (latent_frames - 1) + ratio for a in anchors)
        raw.append(s_edge if near else s_mid)
    out = []
    for i in range(latent_frames):
        window = [raw[min(max(j, 0), latent_frames - 1)] for j in range(i - smooth, i + smooth + 1)]
        out.append(math.fsum(window) / len(window))
    return np.array(out)


def rope_factors(grid, head_dim, scale, mode, theta=10000.0):
    """Complex factor of every token and pair, [F * h * w, head_dim / 2]; mode None is without ReTRo."""
    frames, height, width = grid
    spatial = head_dim // 6
    temporal = head_dim // 2 - 2 * spatial
    place = [0.0]
    for i in range(1, frames):
        place.append(place[-1] + (scale[i] + scale[i - 1]) / 2)
    rows = []
    for i in range(frames):
        position = {"frequency": scale[i] * i, "position": place[i] * (frames - 1) / place[-1]}.get(mode, i)
        gain = scale[i] if mode == "magnitude" else 1.0
        for y in range(height):
            for x in range(width):
                row = [gain * np.exp(1j * position * theta ** (-m / temporal)) for m in range(temporal)]
                for p in (y, x):
                    row += [np.exp(1j * p * theta ** (-m / spatial)) for m in range(spatial)]
                rows.append(row)
    return np.array(rows)


def probabilities(q, k, frames, bias=None):
    """softmax(q k^T / sqrt(D) + bias), [B, N, S, K]; bias [B, F, K]."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, length, heads, width = q.shape
    out = np.zeros((batch, heads, length, k.shape[1]))
    for b in range(batch):
        for n in range(heads):
            for s in range(length):
                logits = k[b, :, n] @ q[b, s, n] / math.sqrt(width)
                if bias is not None:
                    logits = logits + np.asarray(bias, np.float64)[b, s // (length // frames)]
                weights = np.exp(logits - logits.max())
                out[b, n, s] = weights / weights.sum()
    return out


def frame_attention(q, k, frames, bias=None):
    """A [B, F, K]: the mean over heads and over the queries of a frame."""
    p = probabilities(q, k, frames, bias)
    size = p.shape[2] // frames
    return np.stack([p[:, :, i * size : (i + 1) * size].mean((1, 2)) for i in range(frames)], 1)


def anchor_bias(attention, strength, curve=None, floor=5e-4, anchors=None):
    """B [B, F, K] from A [B, F, K], strength [B, F] and curve [F] (default linear)."""
    out = np.zeros(attention.shape)
    batch, frames, _ = attention.shape
    anchors = (0, frames - 1) if anchors is None else anchors
    rows = anchor_curve(frames, anchors, curve)
    for b in range(batch):
        for i in range(frames):
            target = sum(rows[i, a] * attention[b, anchors[a]] for a in range(len(anchors)))
            out[b, i] = strength[b, i] * (
                np.log(np.maximum(target, floor)) - np.log(np.maximum(attention[b, i], floor))
            )
    return out


def groups(branches, isolated):
    """Which branches share a softmax."""
    if isolated:
        return [[i] for i in range(len(branches))]
    return [[0], list(range(1, len(branches)))][: len(branches)]


def bias(q, keys, strength, isolated, curve=None, floor=5e-4, anchors=None):
    """KAB's bias, a list of [B, F, K], one for each branch."""
    out = []
    for group in groups(keys, isolated):
        joint = np.concatenate([keys[i] for i in group], 1)
        b = anchor_bias(frame_attention(q, joint, strength.shape[1]), strength, curve, floor, anchors)
        out += np.split(b, np.cumsum([keys[i].shape[1] for i in group])[:-1], -1)
    return out


def looks(q, keys, frames, isolated, added=None):
    """Frame attention of each branch, a list of [B, F, K]; `added` is a bias for each branch."""
    out = []
    for group in groups(keys, isolated):
        joint = np.concatenate([keys[i] for i in group], 1)
        b = None if added is None else np.concatenate([added[i] for i in group], -1)
        out += np.split(frame_attention(q, joint, frames, b), np.cumsum([keys[i].shape[1] for i in group])[:-1], -1)
    return out


def cross_attention(
    q, keys, values, strength, isolated, weights=None, added=None, curve=None, floor=5e-4, anchors=None
):
    """[B, S, N, D]; strength [B, F]; `added` is the caller's bias, a list of [B, F, K] (None is zero)."""
    frames = strength.shape[1]
    weights = np.ones(len(keys)) if weights is None else weights
    total = bias(q, keys, strength, isolated, curve, floor, anchors)
    if added is not None:
        total = [b if a is None else b + np.asarray(a, np.float64) for b, a in zip(total, added, strict=True)]
    out = 0.0
    for group in groups(keys, isolated):
        k = np.concatenate([keys[i] for i in group], 1)
        v = np.concatenate([np.asarray(values[i], np.float64) for i in group], 1)
        p = probabilities(q, k, frames, np.concatenate([total[i] for i in group], -1))
        weight = weights[group[0]] if isolated else 1
        out = out + weight * np.einsum("BNSK,BKND->BSND", p, v)
    return out
