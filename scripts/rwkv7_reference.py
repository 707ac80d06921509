"""RWKV-7 in plain maths, for golden files: readable and slow; any dtype, any shapes, autograd.

Sources: the RWKV-7 paper, arXiv 2503.14456, and BlinkDL/RWKV-LM RWKV-v7/train_temp/src/model.py, with
parameter names and shapes as in RWKV-LM's checkpoints. Shape letters: B batch, T sequence,
C n_embd, H heads, N head_size, L n_layer, V vocab_size.
"""

import math

import torch
import torch.nn.functional as F

from rwkv4_reference import layer_norm, shifted


def wkv7(r_BTHN, w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN):
    """The recurrence from an empty state, whose rows are values and columns keys; w is the decay."""
    batch, _, heads, size = r_BTHN.shape
    S_BHNN = torch.zeros(batch, heads, size, size, dtype=r_BTHN.dtype)
    rows = []
    inputs = (r_BTHN, w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN)
    for r, w, k, v, a, b in zip(*(x.unbind(1) for x in inputs)):
        u_BHN1 = S_BHNN @ a[..., None]
        S_BHNN = S_BHNN * w[..., None, :] + u_BHN1 * b[..., None, :] + v[..., None] * k[..., None, :]
        rows.append((S_BHNN @ r[..., None])[..., 0])
    return torch.stack(rows, 1)


def time_mix(x_BTC, p, name, v_first_BTC):
    """Returns (what is added to the residual, v before its residual: v_first if this is layer 0)."""
    d_BTC = shifted(x_BTC) - x_BTC
    heads, size = p[name + ".r_k"].shape

    def mixed(letter):
        return x_BTC + d_BTC * p[f"{name}.x_{letter}"].flatten()

    def low_rank(letter, inner=lambda x: x):
        return inner(mixed(letter) @ p[f"{name}.{letter}1"]) @ p[f"{name}.{letter}2"]

    def biased(letter, x):
        return p[f"{name}.{letter}0"].flatten() + x

    def by_head(x):
        return x.unflatten(-1, (heads, size))

    r = mixed("r") @ p[name + ".receptance.weight"].T
    k = mixed("k") @ p[name + ".key.weight"].T
    v = v_own = mixed("v") @ p[name + ".value.weight"].T
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(biased("w", low_rank("w", torch.tanh))))
    rate = torch.sigmoid(biased("a", low_rank("a")))
    gate = low_rank("g", torch.sigmoid)
    if v_first_BTC is not None:
        v = v + (v_first_BTC - v) * torch.sigmoid(biased("v", low_rank("v")))
    removed = F.normalize(by_head(k * p[name + ".k_k"].flatten()), dim=-1)
    k = k * (1 + (rate - 1) * p[name + ".k_a"].flatten())
    r, k, v = by_head(r), by_head(k), by_head(v)
    y = wkv7(r, by_head(decay), k, v, -removed, removed * by_head(rate))
    y = F.group_norm(y.flatten(2).flatten(0, 1), heads, p[name + ".ln_x.weight"],
                     p[name + ".ln_x.bias"], eps=64e-5).view_as(x_BTC)
    bonus = (r * k * p[name + ".r_k"]).sum(-1, keepdim=True) * v
    return ((y + bonus.flatten(2)) * gate) @ p[name + ".output.weight"].T, v_own


def channel_mix(x_BTC, p, name):
    x_k_C = p[name + ".x_k"].flatten()
    k_BTF = (x_BTC + (shifted(x_BTC) - x_BTC) * x_k_C) @ p[name + ".key.weight"].T
    return torch.relu(k_BTF) ** 2 @ p[name + ".value.weight"].T


def logits_of(p, tokens_BT):
    n_layer = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    x_BTC = layer_norm(p["emb.weight"][tokens_BT], p, "blocks.0.ln0")
    v_first_BTC = None
    for i in range(n_layer):
        out_BTC, v_BTC = time_mix(layer_norm(x_BTC, p, f"blocks.{i}.ln1"), p, f"blocks.{i}.att",
                                  v_first_BTC)
        v_first_BTC = v_BTC if i == 0 else v_first_BTC
        x_BTC = x_BTC + out_BTC
        x_BTC = x_BTC + channel_mix(layer_norm(x_BTC, p, f"blocks.{i}.ln2"), p, f"blocks.{i}.ffn")
    return layer_norm(x_BTC, p, "ln_out") @ p["head.weight"].T
