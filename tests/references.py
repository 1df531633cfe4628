"""The formulas again, slowly: float64, plain Python numbers and lists, one loop per sum.

Each function works on one image of the batch and one head, unless it says otherwise. They share nothing with the
package, so a mistake has to be made twice to pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Vector = list[float]
Matrix = list[list[float]]


def over_batch(reference: Callable[..., Any], *arguments: Any, **options: Any) -> Tensor:
    """Run a reference on each element of the batch; tensors are split along their first axis, the rest passed on."""
    batch = next(len(a) for a in arguments if isinstance(a, Tensor))
    rows = [
        reference(*[a[b].tolist() if isinstance(a, Tensor) else a for a in arguments], **options) for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.int64 if isinstance(_first(rows), int) else torch.float64)


def _first(nested: Any) -> Any:
    return _first(nested[0]) if isinstance(nested, list) else nested


def finite_difference(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Gradient of a scalar function of a float64 tensor by central differences, entry by entry."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += step
        down.view(-1)[i] -= step
        gradient.view(-1)[i] = (function(up) - function(down)) / (2 * step)
    return gradient


# --- attention maps ---------------------------------------------------------------------------------------------------


def attention_map(q: Matrix, k: Matrix, scale: float) -> Matrix:
    a = []
    for q_i in q:
        weights = [math.exp(scale * sum(x * y for x, y in zip(q_i, k_j, strict=True))) for k_j in k]
        a.append([weight / sum(weights) for weight in weights])
    return a


def attention_maps(q: list[Matrix], k: list[Matrix], scale: float) -> list[Matrix]:
    """All heads."""
    return [attention_map(q_head, k_head, scale) for q_head, k_head in zip(q, k, strict=True)]


def mean_attention_map(q: list[Matrix], k: list[Matrix], scale: float) -> Matrix:
    maps = attention_maps(q, k, scale)
    return [[sum(a[i][j] for a in maps) / len(maps) for j in range(len(maps[0][0]))] for i in range(len(maps[0]))]


# --- ranking ----------------------------------------------------------------------------------------------------------


def self_attention(a: Matrix, s_k: Vector) -> Vector:
    return s_k


def entropy(a: Matrix, s_k: Vector) -> Vector:
    s_q = []
    for row in a:
        reward = sum(row[j] * s_k[j] for j in range(len(s_k)))
        row_entropy = -sum(x * math.log(x) for x in row if x > 0)
        s_q.append(reward / max(row_entropy, 1e-6))
    return s_q


def hard_clip(a: Matrix, s_k: Vector, eta: float = 0.2) -> Vector:
    return [sum(s_k[j] for j in range(len(s_k)) if row[j] >= eta) for row in a]


def soft_clip(a: Matrix, s_k: Vector, eta: float = 0.2) -> Vector:
    return [sum(1 / (1 + math.exp(-(row[j] - eta))) * s_k[j] for j in range(len(s_k))) for row in a]


def power(a: Matrix, s_k: Vector, alpha: float = 5.0, beta: float | None = None) -> Vector:
    beta = len(s_k) / 2 if beta is None else beta
    return [sum((beta * s_k[j]) ** (alpha * row[j]) for j in range(len(s_k))) for row in a]


MAPPINGS: dict[str, Callable[[Matrix, Vector], Vector]] = {
    "self-attention": self_attention,
    "entropy": entropy,
    "hard-clip": hard_clip,
    "soft-clip": soft_clip,
    "power": power,
}


def gwpr(a: Matrix, mapping: str, iterations: int) -> Vector:
    m, n = len(a), len(a[0])
    s_q = [1 / m] * m
    for _ in range(iterations):
        s_k = [sum(a[i][j] * s_q[i] for i in range(m)) for j in range(n)]
        s_q = MAPPINGS[mapping](a, s_k)
        total = sum(s_q)
        s_q = [s / total for s in s_q] if total > 0 else [1 / m] * m
    return s_q


def importance(
    q: list[Matrix], k: list[Matrix], scale: float, mapping: str, head_fusion: str, iterations: int
) -> Vector:
    """All heads."""
    if head_fusion == "mean-map":
        return gwpr(mean_attention_map(q, k, scale), mapping, iterations)
    per_head = [gwpr(a, mapping, iterations) for a in attention_maps(q, k, scale)]
    return [math.sqrt(sum(s[i] ** 2 for s in per_head) / len(per_head)) for i in range(len(per_head[0]))]


def uniform_random(batch: int, tokens: int, seed: int, step: int) -> Matrix:
    """All of the batch. 32-bit arithmetic written with Python's unbounded integers, so nothing can overflow."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B9) % 2**32
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    def draw(b: int, t: int) -> float:
        state = 0
        for word in (seed % 2**32, (seed >> 32) % 2**32, step, b, t):
            state = mix((state + word) % 2**32)
        return (state >> 8) / 2**24

    return [[draw(b, t) for t in range(tokens)] for b in range(batch)]


# --- pruning ----------------------------------------------------------------------------------------------------------


def keep_most_important(importance: Vector, count: int) -> list[int]:
    best_first = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    return sorted(best_first[:count])


def gather_tokens(tokens: Matrix, index: list[int]) -> Matrix:
    return [tokens[i] for i in index]


# --- recovery ---------------------------------------------------------------------------------------------------------


def attention_source(a: Matrix, keep: list[int]) -> list[int]:
    source = []
    for b in range(len(a)):
        column = [a[i][b] for i in keep]
        source.append(keep.index(b) if b in keep else column.index(max(column)))
    return source


def cosine_source(tokens: Matrix, keep: list[int]) -> list[int]:
    def cosine(x: Vector, y: Vector) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))

    source = []
    for b in range(len(tokens)):
        similarity = [cosine(tokens[i], tokens[b]) for i in keep]
        source.append(keep.index(b) if b in keep else similarity.index(max(similarity)))
    return source


def nearest_source(tokens: Matrix, keep: list[int]) -> list[int]:
    source = []
    for b in range(len(tokens)):
        apart = [math.dist(tokens[i], tokens[b]) for i in keep]
        source.append(keep.index(b) if b in keep else apart.index(min(apart)))
    return source


def direct_copy(kept: Matrix, keep: list[int], before: Matrix) -> Matrix:
    return [kept[keep.index(b)] if b in keep else before[b] for b in range(len(before))]


def zero_padding(kept: Matrix, keep: list[int], tokens: int) -> Matrix:
    return direct_copy(kept, keep, [[0.0] * len(kept[0]) for _ in range(tokens)])


def bicubic_interpolation(kept: Matrix, keep: list[int], size: tuple[int, int]) -> Matrix:
    h, w = size
    padded = zero_padding(kept, keep, h * w)
    whole: Matrix = [[] for _ in range(h * w)]
    for c in range(len(kept[0])):
        image = [[padded[y * w + x][c] for x in range(w)] for y in range(h)]
        resized = bicubic_resize(bicubic_resize(image, max(h // 2, 1), max(w // 2, 1)), h, w)
        for b in range(h * w):
            whole[b].append(resized[b // w][b % w])
    return direct_copy(kept, keep, whole)


def group_means(tokens: Matrix, source: list[int], kept: int) -> Matrix:
    means = []
    for k in range(kept):
        group = [token for token, of in zip(tokens, source, strict=True) if of == k]
        means.append([sum(column) / len(group) for column in zip(*group, strict=True)])
    return means


def matched_update(kept: Matrix, start: Matrix, before: Matrix, source: list[int]) -> Matrix:
    """Each token plus what its match was given."""
    return [
        [x + y - z for x, y, z in zip(token, kept[s], start[s], strict=True)]
        for token, s in zip(before, source, strict=True)
    ]


def bicubic_resize(image: Matrix, h: int, w: int) -> Matrix:
    """Keys' cubic convolution with a = -0.75, half-pixel centres, edge pixels repeated beyond the border."""

    def weight(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        if d < 2:
            return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return 0.0

    def at(position: float, old: int) -> list[tuple[int, float]]:
        left = math.floor(position)
        return [(min(max(i, 0), old - 1), weight(position - i)) for i in range(left - 1, left + 3)]

    old_h, old_w = len(image), len(image[0])
    return [
        [
            sum(
                weight_y * weight_x * image[i][j]
                for i, weight_y in at((y + 0.5) * old_h / h - 0.5, old_h)
                for j, weight_x in at((x + 0.5) * old_w / w - 0.5, old_w)
            )
            for x in range(w)
        ]
        for y in range(h)
    ]
