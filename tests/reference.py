"""Slow, obvious float64 versions of what the project computes, written from the formulas alone."""

import math

import torch
import torch.nn.functional as F


def svd_polar(X, interlude=None):
    """U V^T of the thin SVD, without the directions that are zero but for the rounding of float32 input."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    kept = 1e-6 * S.norm().clamp(min=1e-300) < S
    factor = U[:, kept] @ Vh[kept]
    return svd_polar(interlude(svd_polar(interlude(factor)))) if interlude else factor


def polynomial(X, coefficients):
    """U p(S) V^T."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    for a, b, c in coefficients:
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag(S) @ Vh


def polynomial_polar(X, interlude=None, *, coefficients, norm_margin):
    """What a schedule computes in exact arithmetic."""
    X = X.double() / (norm_margin * X.double().norm()).clamp(min=1e-300)
    if not interlude:
        return polynomial(X, coefficients)
    if len(coefficients) == 12:  # exact enough to end with its own last steps
        X = interlude(polynomial(X, coefficients[:8]))
        return polynomial(interlude(polynomial(X, coefficients[8:10])), coefficients[10:])
    X = interlude(polynomial(interlude(polynomial(X, coefficients[:2])), coefficients[2:4]))
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = 3.3072 * S - 5.9616 * S**3 + 5.4791 * S**5 - 2.2070 * S**7 + 0.3181 * S**9
    return U @ torch.diag(S) @ Vh


def muon(X, state, polar):
    return polar(X)


def normuon(X, state, polar, beta2=0.95, eps=1e-10):
    factor = polar(X)
    v = state.get("row_second_moment", torch.zeros(X.shape[0], dtype=torch.float64))
    state["row_second_moment"] = v = beta2 * v + (1 - beta2) * (factor**2).mean(1)
    scaled = factor / (v.sqrt() + eps)[:, None]
    norm = scaled.norm()
    return scaled * (factor.norm() / norm) if norm > 0 else scaled


def unormuon(X, state, polar):
    """NorMuon, times sqrt(N/M) on tall matrices."""
    rows, columns = X.shape
    return normuon(X, state, polar) * math.sqrt(min(1.0, columns / rows))


def on_the_tall(rule):
    """A rule for tall matrices as one for all: wide ones are transposed, square ones get the polar factor."""

    def any_shape(X, state, polar, **options):
        rows, columns = X.shape
        if rows == columns:
            return polar(X)
        if rows < columns:
            return rule(X.double().T, state, polar, **options).T
        return rule(X.double(), state, polar, **options)

    return any_shape


def to_equal_rows(U, max_scale_error=0.0):
    """The factors that give all rows but zero ones one norm, and U the norm that it has or, if near, at full rank."""
    norms = U.norm(dim=1)
    live = norms > 1e-7
    full = min(live.sum().item(), U.shape[1]) ** 0.5
    growth = (full / U.norm().clamp(min=1e-7)).clamp(1 - max_scale_error, 1 + max_scale_error)
    return torch.where(live, (growth * U.norm() / live.sum().clamp(min=1) ** 0.5) / norms, 1.0)


def unit_rows(X):
    norms = X.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, X / norms, 0.0)


@on_the_tall
def aurora_iterated(X, state, polar, balance_steps=2, balance_power=0.5):
    D = torch.ones(X.shape[0], dtype=torch.float64)
    U = polar(unit_rows(X))
    for _ in range(balance_steps - 1):
        row_sq = (U**2).sum(1)
        D = torch.where(row_sq > 1e-14, D * ((X.shape[1] / X.shape[0]) / row_sq) ** balance_power, D)
        U = polar(D[:, None] * unit_rows(X))
    return U


def remember(state, weight, correction):
    new = weight * correction
    state["row_weight"] = (new / new.log().mean().exp()).clamp(1 / 64, 64)


@on_the_tall
def aurora_warm(X, state, polar, is_refined=False):
    weight = state.get("row_weight", torch.ones(X.shape[0], dtype=torch.float64))
    U, first = polar(weight[:, None] * unit_rows(X)), 1.0
    if is_refined:
        first = to_equal_rows(U).clamp(max=1.3)
        U = polynomial(first[:, None] * U, [(15 / 8, -10 / 8, 3 / 8)])
    last = to_equal_rows(U, state["max_error"])
    remember(state, weight, first * last)
    return last[:, None] * U


@on_the_tall
def aurora_folded(X, state, polar):
    weight = state.get("row_weight", torch.ones(X.shape[0], dtype=torch.float64))
    corrections = []

    def interlude(V):
        corrections.append(to_equal_rows(V).clamp(max=1.3 * 1.01))
        return corrections[-1][:, None] / 1.3 * V

    U = polar(weight[:, None] * unit_rows(X), interlude)
    corrections.append(to_equal_rows(U, state["max_error"]))
    remember(state, weight, math.prod(corrections))
    return corrections[-1][:, None] * U


def aurora_tall(X, state, polar):
    """With balance = "tall"."""
    return polar(X) if X.shape[0] < X.shape[1] else aurora_folded(X, state, polar)


@on_the_tall
def riemannian_aurora(X, state, polar, ascent_steps=3, ascent_lr=0.1, retraction_steps=2):
    """With the multipliers of the tangent projection from a pseudo-inverse."""

    def orthogonal(X):
        U = polar(X)
        for _ in range(2):
            U = (15 * U - 10 * U @ (U.T @ U) + 3 * U @ (U.T @ U) @ (U.T @ U)) / 8
        return U

    U = orthogonal(X)
    X = X * (math.sqrt(X.shape[1]) / X.norm().clamp(min=1e-300))
    for _ in range(ascent_steps):
        S = (U.T @ X + X.T @ U) / 2
        squares = (U @ U.T) ** 2
        gap = (U * (X - U @ S)).sum(1)
        live = squares.sum(1) > 1e-14
        gap = torch.where(live, gap - gap.sum() / live.sum().clamp(min=1), 0.0)
        L = torch.diag(torch.linalg.pinv(torch.diag(squares.sum(1)) - squares, rtol=1e-9) @ gap)
        U = U + ascent_lr * (X - U @ (S - U.T @ L @ U) - L @ U)
        for _ in range(retraction_steps):
            U = orthogonal(to_equal_rows(U)[:, None] * U)
    return U


RULES = {
    "muon": muon,
    "normuon": normuon,
    "unormuon": unormuon,
    "aurora folded": aurora_folded,
    "aurora warm": aurora_warm,
    "aurora refined": lambda *args: aurora_warm(*args, is_refined=True),
    "aurora iterated": aurora_iterated,
    "aurora tall": aurora_tall,
    "riemannian_aurora": riemannian_aurora,
}


def optimize(rule, W, grads, polar, lr, weight_decay, momentum=0.95, nesterov=True, max_error=0.0):
    """The whole update of the shared formula over a sequence of gradients; returns the weights.

    max_error: the relative error that rules may expect in polar's singular values.
    """
    W, B, state = W.double(), torch.zeros_like(W, dtype=torch.float64), {"max_error": max_error}
    rows, columns = W.shape
    scale = math.sqrt(max(1.0, rows / columns))
    for G in grads:
        G = G.double()
        B = momentum * B + (1 - momentum) * G
        X = (1 - momentum) * G + momentum * B if nesterov else B
        W = (1 - lr * weight_decay) * W - lr * scale * RULES[rule](X, state, polar)
    return W


def gpt_logits(weights, config, tokens):
    """The benchmark's model in plain tensor operations, from a state dict; any float dtype."""
    D, H, T = config.model_dim, config.num_heads, tokens.shape[1]
    K = D // H
    dtype = weights["embed.weight"].dtype
    eps = torch.finfo(torch.float32).eps

    def rms(x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def activations(x, p):  # (B, T, D) to (B, T, hidden width)
        up = linear(x, f"{p}.up")
        if config.mlp == "relu2":
            return torch.clamp(up, min=0) ** 2
        gate = linear(x, f"{p}.gate")
        return gate / (1 + torch.exp(-gate)) * up

    frequencies = [(1 / config.rope_base) ** (i / (K // 4 - 1)) for i in range(K // 4)] + [0.0] * (K // 4)
    angles = torch.tensor([[t * f for f in frequencies] for t in range(T)], dtype=torch.float64).to(dtype)
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):  # (B, T, K): pairs (i, i + K/2)
        x1, x2 = x[..., : K // 2], x[..., K // 2 :]
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)

    future = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    x = rms(weights["embed.weight"][tokens]) * weights["embed_norm.gain"]
    for i in range(config.num_layers):
        p = f"blocks.{i}"
        h = rms(x) * weights[f"{p}.attention_norm.gain"]
        q, k, v = (linear(h, f"{p}.attention.{name}") for name in "qkv")
        heads = []
        for j in range(H):
            part = slice(j * K, (j + 1) * K)
            qj, kj, vj = rotate(rms(q[..., part])), rotate(rms(k[..., part])), v[..., part]
            scores = config.attention_scale * qj @ kj.transpose(1, 2)
            heads.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ vj)
        x = x + linear(torch.cat(heads, -1), f"{p}.attention.out")
        x = x + linear(activations(rms(x) * weights[f"{p}.mlp_norm.gain"], f"{p}.mlp"), f"{p}.mlp.down")
    z = linear(rms(x) * weights["head_norm.gain"], "head")
    return config.logit_softcap * z / torch.sqrt(z * z + config.logit_softcap**2)


def gpt_loss(weights, config, inputs, targets):
    return F.cross_entropy(gpt_logits(weights, config, inputs).flatten(0, 1), targets.flatten(), reduction="sum")
