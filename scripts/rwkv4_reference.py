"""RWKV-4 in plain maths, for golden files: readable and slow; any dtype, any shapes, autograd.

Sources: the RWKV paper, arXiv 2305.13048, section 4 and appendix D (the stable recurrence), with
parameter names and shapes as in RWKV-LM's checkpoints. Shape letters: B batch, T sequence,
C n_embd, A dim_att, F dim_ffn, L n_layer, V vocab_size.
"""

import torch
import torch.nn.functional as F


def wkv4(w_log_A, u_A, k_BTA, v_BTA, state_B3A):
    """The attention of RWKV-4: returns (y_BTA, final state_B3A).

    State rows: aa, bb (numerator, denominator) and pp, the log of the scale both are divided by.
    The result does not depend on the scale, so autograd may take it as a constant: detaching it
    leaves every gradient exact, where differentiating max() would only add rounding.
    """
    aa, bb, pp = state_B3A[:, 0], state_B3A[:, 1], state_B3A[:, 2].detach()
    rows = []
    for k, v in zip(k_BTA.unbind(1), v_BTA.unbind(1)):
        q = torch.maximum(pp, u_A + k).detach()
        old, new = torch.exp(pp - q), torch.exp(u_A + k - q)
        rows.append((old * aa + new * v) / (old * bb + new))
        q = torch.maximum(pp + w_log_A, k).detach()
        old, new = torch.exp(pp + w_log_A - q), torch.exp(k - q)
        aa, bb, pp = old * aa + new * v, old * bb + new, q
    return torch.stack(rows, 1), torch.stack([aa, bb, pp], 1)


def fresh_wkv_state(batch, dim_att, dtype):
    state_B3A = torch.zeros(batch, 3, dim_att, dtype=dtype)
    state_B3A[:, 2] = -1e38
    return state_B3A


def shifted(x_BTC):
    """Each position sees the one before it; the first sees zeros."""
    return F.pad(x_BTC[:, :-1], (0, 0, 1, 0))


def layer_norm(x_BTC, p, name):
    return F.layer_norm(x_BTC, x_BTC.shape[-1:], p[name + ".weight"], p[name + ".bias"], eps=1e-5)


def time_mix(x_BTC, p, name):
    xx_BTC = shifted(x_BTC)

    def mixed(letter, matrix):
        mix_C = p[f"{name}.time_mix_{letter}"].flatten()
        return (x_BTC * mix_C + xx_BTC * (1 - mix_C)) @ p[f"{name}.{matrix}.weight"].T

    k_BTA, v_BTA, r_BTA = mixed("k", "key"), mixed("v", "value"), mixed("r", "receptance")
    w_log_A = -torch.exp(p[name + ".time_decay"])
    start_B3A = fresh_wkv_state(x_BTC.shape[0], w_log_A.shape[0], x_BTC.dtype)
    y_BTA, state_B3A = wkv4(w_log_A, p[name + ".time_first"], k_BTA, v_BTA, start_B3A)
    return (torch.sigmoid(r_BTA) * y_BTA) @ p[name + ".output.weight"].T, state_B3A


def channel_mix(x_BTC, p, name):
    xx_BTC = shifted(x_BTC)
    mix_k_C, mix_r_C = p[name + ".time_mix_k"].flatten(), p[name + ".time_mix_r"].flatten()
    k_BTF = (x_BTC * mix_k_C + xx_BTC * (1 - mix_k_C)) @ p[name + ".key.weight"].T
    r_BTC = (x_BTC * mix_r_C + xx_BTC * (1 - mix_r_C)) @ p[name + ".receptance.weight"].T
    return torch.sigmoid(r_BTC) * (torch.relu(k_BTF) ** 2 @ p[name + ".value.weight"].T)


def forward(p, tokens_BT):
    """Returns (logits_BTV, state): state maps "<layer>.ffn_x", ".att_x", ".aa", ".bb", ".pp" to
    [B, C] or [B, A], what is carried to the token after the last one."""
    n_layer = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    state = {}
    x_BTC = layer_norm(p["emb.weight"][tokens_BT], p, "blocks.0.ln0")
    for i in range(n_layer):
        normed_BTC = layer_norm(x_BTC, p, f"blocks.{i}.ln1")
        out_BTC, wkv_B3A = time_mix(normed_BTC, p, f"blocks.{i}.att")
        x_BTC = x_BTC + out_BTC
        state[f"{i}.att_x"] = normed_BTC[:, -1]
        state[f"{i}.aa"], state[f"{i}.bb"], state[f"{i}.pp"] = wkv_B3A.unbind(1)
        normed_BTC = layer_norm(x_BTC, p, f"blocks.{i}.ln2")
        x_BTC = x_BTC + channel_mix(normed_BTC, p, f"blocks.{i}.ffn")
        state[f"{i}.ffn_x"] = normed_BTC[:, -1]
    return layer_norm(x_BTC, p, "ln_out") @ p["head.weight"].T, state


def logits_of(p, tokens_BT):
    return forward(p, tokens_BT)[0]


def loss_and_gradients(params, tokens_BT, targets_BT, l2wrap=0.0, logits_of=logits_of):
    """Mean cross-entropy and its gradient with respect to every tensor of params.

    With l2wrap = f, the gradient of the logits gets f / (B*T) * max logit at each position's
    largest logit, as RWKV-LM's L2Wrap does; the loss returned stays the plain cross-entropy.
    """
    p = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    logits_BTV = logits_of(p, tokens_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    # d/dx (x^2 / 2) = x: half the square of each largest logit has L2Wrap's term as its gradient.
    penalty = 0.5 * l2wrap * (logits_BTV.max(-1).values ** 2).mean()
    gradients = torch.autograd.grad(loss + penalty, list(p.values()))
    return loss.detach(), dict(zip(p, gradients))
