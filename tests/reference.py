"""Slow, obvious float64 versions of what the project computes, written from the formulas alone."""

import math

import torch
import torch.nn.functional as F


def svd_polar(X):
    """U V^T of the thin SVD, without the directions that are zero but for the rounding of float32 input."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    kept = 1e-6 * S.norm().clamp(min=1e-300) < S
    return U[:, kept] @ Vh[kept]


def polynomial_polar(X, coefficients, norm_margin):
    """U p(S) V^T: what a schedule computes in exact arithmetic."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    s = S / (norm_margin * S.norm()).clamp(min=1e-300)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ Vh


def muon(X, state, polar):
    return polar(X)


def normuon(X, state, polar, beta2=0.95, eps=1e-10):
    factor = polar(X)
    state["v"] = beta2 * state.get("v", torch.zeros(X.shape[0], dtype=torch.float64)) + (1 - beta2) * (factor**2).mean(
        1
    )
    scaled = factor / (state["v"].sqrt() + eps)[:, None]
    norm = scaled.norm()
    return scaled * (factor.norm() / norm) if norm > 0 else scaled


def unormuon(X, state, polar):
    """NorMuon, times sqrt(N/M) on tall matrices."""
    rows, columns = X.shape
    return normuon(X, state, polar) * math.sqrt(min(1.0, columns / rows))


def aurora(X, state, polar, balance_steps=2, balance_power=0.5):
    rows, columns = X.shape
    if rows == columns:
        return polar(X)
    if rows < columns:
        return aurora(X.T, state, polar, balance_steps, balance_power).T
    X = X.double()
    norms = X.norm(dim=1)
    D = torch.where(norms > 0, 1 / norms, 0.0)
    for k in range(balance_steps):
        U = polar(D[:, None] * X)
        if k < balance_steps - 1:
            row_sq = (U**2).sum(1)
            D = torch.where(row_sq > 0, D * ((columns / rows) / row_sq) ** balance_power, 0.0)
    return U


RULES = {"Muon": muon, "NorMuon": normuon, "UNorMuon": unormuon, "Aurora": aurora}


def optimize(rule, W, grads, polar, lr, weight_decay, momentum=0.95, nesterov=True):
    """The whole update of the shared formula over a sequence of gradients; returns the weights."""
    W, B, state = W.double(), torch.zeros_like(W, dtype=torch.float64), {}
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
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

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
        h = linear(rms(x) * weights[f"{p}.mlp_norm.gain"], f"{p}.mlp.up")
        x = x + linear(torch.clamp(h, min=0) ** 2, f"{p}.mlp.down")
    z = linear(rms(x) * weights["head_norm.gain"], "head")
    return config.logit_softcap * z / torch.sqrt(z * z + config.logit_softcap**2)


def gpt_loss(weights, config, inputs, targets):
    return F.cross_entropy(gpt_logits(weights, config, inputs).flatten(0, 1), targets.flatten(), reduction="sum")
