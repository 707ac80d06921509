#!/usr/bin/env python3
"""Writes tests/golden: small RWKV-4 and -7 files to compare the program with. See the README there.

    .deps/venv/bin/python scripts/make_golden.py            writes them anew
    .deps/venv/bin/python scripts/make_golden.py --check    compares anew with what is there

Every value is checked here against something else before it is written: logits against the PyPI
package `rwkv`, the optimizer against torch.optim.AdamW, the wkv op against its definition in long
double and central differences, and the whole model against ROOKERY_TEST_DATA if that is set.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import sys
import tempfile

# Read by the package when it is imported.
os.environ["RWKV_JIT_ON"] = "0"
os.environ["RWKV_CUDA_ON"] = "0"
os.environ["RWKV_V7_ON"] = "0"

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import rwkv4_reference as ref
import rwkv7_reference

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
L2WRAP = 1e-4


def require(condition, text):
    if not condition:
        raise SystemExit(f"make_golden.py: {text}")


def relative(found, expected):
    """Size of the difference over the size of `expected`, both as root of the sum of squares."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def as_f64(params):
    return {name: value.double() for name, value in params.items()}


def as_f32(params, prefix=""):
    return {prefix + name: value.float().contiguous() for name, value in params.items()}


# ---- Models ------------------------------------------------------------------------------------


# Weights of which each tensor moves the logits: an untrained model would not do, for its att.output
# and ffn.value are zero, and with them every gradient behind them.


class Draw:
    def __init__(self, seed, n_embd):
        self.rng, self.n_embd = np.random.default_rng(seed), n_embd

    def normal(self, *shape, mean=0.0, std=1.0):
        return torch.tensor(self.rng.normal(mean, std, shape), dtype=torch.float32)

    def mix(self):
        # Past both ends of [0, 1]: trained models go there, and their initial values do too.
        return torch.tensor(self.rng.uniform(-0.1, 1.2, (1, 1, self.n_embd)), dtype=torch.float32)

    def matrix(self, rows, columns, gain):
        return self.normal(rows, columns, std=gain / math.sqrt(columns))

    def norm(self, name):
        return {name + ".weight": self.normal(self.n_embd, mean=1.0, std=0.2),
                name + ".bias": self.normal(self.n_embd, std=0.2)}

    def block_norms(self, i):
        params = self.norm("blocks.0.ln0") if i == 0 else {}
        return params | self.norm(f"blocks.{i}.ln1") | self.norm(f"blocks.{i}.ln2")


def random_model(seed, n_layer, vocab_size, n_embd, dim_att, dim_ffn):
    draw = Draw(seed, n_embd)
    normal, mix, matrix = draw.normal, draw.mix, draw.matrix
    params = {"emb.weight": normal(vocab_size, n_embd)}
    for i in range(n_layer):
        params |= draw.block_norms(i)
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        # w_log from -3e-4 (nothing is forgotten in a sequence) to -20 (all of it in one step).
        decay = np.linspace(-8.0, 3.0, dim_att)
        params[att + "time_decay"] = torch.tensor(draw.rng.permutation(decay), dtype=torch.float32)
        params[att + "time_first"] = normal(dim_att)
        for letter in "kvr":
            params[att + "time_mix_" + letter] = mix()
        params[att + "key.weight"] = matrix(dim_att, n_embd, 1.5)
        params[att + "value.weight"] = matrix(dim_att, n_embd, 1.0)
        params[att + "receptance.weight"] = matrix(dim_att, n_embd, 1.0)
        params[att + "output.weight"] = matrix(n_embd, dim_att, 1.5)
        for letter in "kr":
            params[ffn + "time_mix_" + letter] = mix()
        params[ffn + "key.weight"] = matrix(dim_ffn, n_embd, 1.0)
        params[ffn + "receptance.weight"] = matrix(n_embd, n_embd, 1.0)
        params[ffn + "value.weight"] = matrix(n_embd, dim_ffn, 1.0)
    params |= draw.norm("ln_out")
    params["head.weight"] = matrix(vocab_size, n_embd, 4.0)
    return params


def random_rwkv7(seed, n_layer, vocab_size, n_embd, head_size, dim_ffn, ranks):
    """ranks: of w, a, v and g. Block 0 has no v0, v1, v2, which nothing reads."""
    draw = Draw(seed, n_embd)
    params = {"emb.weight": draw.normal(vocab_size, n_embd)}
    for i in range(n_layer):
        params |= draw.block_norms(i)
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for letter in "rwkvag":
            params[att + "x_" + letter] = draw.mix()
        letters = "wag" if i == 0 else "wavg"
        for letter in letters:
            # A decay is soon forgotten: it must move far to show.
            gain = 3.0 if letter == "w" else 1.0
            params[att + letter + "1"] = draw.matrix(n_embd, ranks[letter], gain)
            params[att + letter + "2"] = draw.matrix(ranks[letter], n_embd, 2.0)
        # The decay from e^-0.0002 to e^-0.6.
        params[att + "w0"] = torch.tensor(
            draw.rng.permutation(np.linspace(-8.0, 3.0, n_embd)), dtype=torch.float32).view(1, 1, -1)
        for letter in letters[1:-1]:
            params[att + letter + "0"] = draw.normal(1, 1, n_embd)
        params[att + "k_k"] = draw.normal(1, 1, n_embd, mean=0.8, std=0.3)
        params[att + "k_a"] = draw.normal(1, 1, n_embd, mean=1.0, std=0.3)
        params[att + "r_k"] = draw.normal(n_embd // head_size, head_size, std=0.3)
        for name, gain in [("receptance", 1.0), ("key", 1.0), ("value", 1.0), ("output", 1.0)]:
            params[f"{att}{name}.weight"] = draw.matrix(n_embd, n_embd, gain)
        params |= draw.norm(att + "ln_x")
        params[ffn + "x_k"] = draw.mix()
        params[ffn + "key.weight"] = draw.matrix(dim_ffn, n_embd, 1.0)
        params[ffn + "value.weight"] = draw.matrix(n_embd, dim_ffn, 1.0)
    params |= draw.norm("ln_out")
    params["head.weight"] = draw.matrix(vocab_size, n_embd, 1.5)
    return params


def random_tokens(seed, vocab_size, *shape):
    return torch.tensor(np.random.default_rng(seed).integers(0, vocab_size, shape))


def require_every_tensor_matters(params, tokens_BT, logits_of=ref.logits_of):
    logits_BTV = logits_of(as_f64(params), tokens_BT)
    for name in params:
        changed = as_f64(params)
        # Not one factor for all: a LayerNorm behind would take it out again.
        wave = torch.cos(torch.arange(params[name].numel())).view(params[name].shape)
        changed[name] = changed[name] * (1 + 0.1 * wave)
        difference = relative(logits_of(changed, tokens_BT), logits_BTV)
        require(difference > 1e-3, f"10% of {name} moves the logits by {difference:.1e} only")


def logits_of_rwkv_package(params, tokens):
    """Logits at every position, and the state after the last, of the PyPI package."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.save(params, os.path.join(folder, "model.pth"))
        from rwkv.model import RWKV
        model = RWKV(model=os.path.join(folder, "model"), strategy="cpu fp32")
        logits_TV, state = model.forward(tokens, None, full_output=True)
    rows = ["att_x", "aa", "bb", "pp", "ffn_x"]
    return logits_TV, {f"{i // 5}.{rows[i % 5]}": row for i, row in enumerate(state)}


def odd_model_files():
    params = random_model(seed=4, n_layer=3, vocab_size=97, n_embd=40, dim_att=40, dim_ffn=104)
    tokens = random_tokens(41, 97, 37)
    require_every_tensor_matters(params, tokens[None])
    with torch.no_grad():
        logits_f64, state_f64 = ref.forward(as_f64(params), tokens[None])
    logits_f64, state_f64 = logits_f64[0], {name: row[0] for name, row in state_f64.items()}
    logits, state = logits_of_rwkv_package(params, tokens.tolist())
    difference = (logits - logits_f64).abs().max().item()
    require(difference < 1e-4, f"the package's logits differ from ours by {difference:.1e}")
    for name, row in state.items():
        require(relative(row, state_f64[name]) < 1e-5, f"the package's state {name} differs")
    print(f"odd model: package rwkv and ours differ by {difference:.1e} in logits up to "
          f"{logits_f64.abs().max():.1f}")
    values = {"tokens": tokens, "logits": logits, "logits_f64": logits_f64}
    values |= as_f32(state, "state.")
    values |= {"state_f64." + name: row for name, row in state_f64.items()}
    return {"rwkv4_odd": params, "rwkv4_odd_logits": values}


def wide_att_files():
    params = random_model(seed=5, n_layer=1, vocab_size=31, n_embd=40, dim_att=56, dim_ffn=72)
    tokens = random_tokens(51, 31, 23)
    require_every_tensor_matters(params, tokens[None])
    with torch.no_grad():
        logits_f64, state_f64 = ref.forward(as_f64(params), tokens[None])
    values = {"tokens": tokens, "logits_f64": logits_f64[0]}
    values |= {"state_f64." + name: row[0] for name, row in state_f64.items()}
    return {"rwkv4_wide_att": params, "rwkv4_wide_att_logits": values}


def gradient_files(params):
    tokens = random_tokens(42, 97, 2, 14)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss, plain = ref.loss_and_gradients(as_f64(params), inputs, targets)
    _, wrapped = ref.loss_and_gradients(as_f64(params), inputs, targets, L2WRAP)
    share = max(relative(wrapped[name], plain[name]) for name in plain)
    print(f"gradients: loss {loss:.9f}, L2Wrap moves a tensor's gradient by {share:.1e} at most")
    values = {"inputs": inputs.contiguous(), "targets": targets.contiguous(), "loss": loss[None]}
    return {"rwkv4_odd_grads": values | as_f32(plain, "ce.") | as_f32(wrapped, "ce_l2wrap.")}


# ---- Ten steps ---------------------------------------------------------------------------------

TEN_STEPS = {
    "steps": 10, "batch_size": 3, "seq_len": 17, "lr_init": 3e-3, "lr_final": 1e-4,
    "warmup_tokens": 2 * 3 * 17, "total_tokens": 10 * 3 * 17, "beta1": 0.9, "beta2": 0.99,
    "eps": 1e-8, "weight_decay": 0.01, "clip": 5.0, "l2wrap": L2WRAP,
    "lr_scale": {"time_decay": 2.0, "time_first": 3.0, "w0": 2.0},
}


def learning_rate(tokens):
    """After `tokens` tokens: exponential from lr_init to lr_final behind a linear warm-up."""
    c = TEN_STEPS
    progress = (tokens - c["warmup_tokens"]) / (c["total_tokens"] - c["warmup_tokens"])
    progress = min(max(progress, 0.0), 1.0)
    warmup = 0.2 + 0.8 * min(tokens / c["warmup_tokens"], 1.0)
    return c["lr_init"] * (c["lr_final"] / c["lr_init"]) ** progress * warmup


def lr_scale(name):
    return TEN_STEPS["lr_scale"].get(name.split(".")[-1], 1.0)


def weight_decay(name, value):
    # RWKV-7's low-rank factors and r_k have two sizes above 1 as well, and no decay.
    is_matrix = name.endswith(".weight") and sum(size > 1 for size in value.shape) >= 2
    return TEN_STEPS["weight_decay"] if is_matrix else 0.0


class AdamW:
    """The update written out; compared with torch.optim.AdamW below."""

    def __init__(self, params):
        self.params, self.step_count = params, 0
        self.m = {name: torch.zeros_like(value) for name, value in params.items()}
        self.v = {name: torch.zeros_like(value) for name, value in params.items()}

    def step(self, gradients, lr):
        c = TEN_STEPS
        self.step_count += 1
        for name, value in self.params.items():
            g, m, v, rate = gradients[name], self.m[name], self.v[name], lr * lr_scale(name)
            value -= rate * weight_decay(name, value) * value
            m += (1 - c["beta1"]) * (g - m)
            v += (1 - c["beta2"]) * (g * g - v)
            m_hat = m / (1 - c["beta1"] ** self.step_count)
            v_hat = v / (1 - c["beta2"] ** self.step_count)
            value -= rate * m_hat / (v_hat.sqrt() + c["eps"])


class TorchAdamW:
    def __init__(self, params):
        self.params = params
        c = TEN_STEPS
        self.optimizer = torch.optim.AdamW(
            [{"params": [value], "weight_decay": weight_decay(name, value),
              "scale": lr_scale(name)}
             for name, value in params.items()],
            betas=(c["beta1"], c["beta2"]), eps=c["eps"], foreach=False)

    def step(self, gradients, lr):
        for name, value in self.params.items():
            value.grad = gradients[name]
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()


def train_steps(params, inputs, targets, optimizer_class, logits_of):
    params = {name: value.clone() for name, value in params.items()}
    optimizer, log = optimizer_class(params), []
    tokens_per_step = TEN_STEPS["batch_size"] * TEN_STEPS["seq_len"]
    for step in range(len(inputs)):
        loss, gradients = ref.loss_and_gradients(params, inputs[step], targets[step], L2WRAP,
                                                 logits_of)
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients.values()))
        coefficient = min(1.0, TEN_STEPS["clip"] / (norm + 1e-6))
        lr = learning_rate(step * tokens_per_step)
        optimizer.step({name: g * coefficient for name, g in gradients.items()}, lr)
        log.append({"step": step, "lr": lr, "loss": loss.item(), "grad_norm": norm,
                    "clip_coefficient": coefficient})
    return params, log


def ten_step_files(version, params, logits_of):
    c = TEN_STEPS
    tokens = random_tokens(43, len(params["emb.weight"]), c["steps"], c["batch_size"], c["seq_len"] + 1)
    inputs, targets = tokens[:, :, :-1].contiguous(), tokens[:, :, 1:].contiguous()
    start = as_f64(params)
    # AdamW does not see a constant factor on its gradients, so clipping every step alike would
    # prove nothing. Every third batch asks for what the model says by then: a small gradient.
    for step in range(0, c["steps"], 3):
        so_far, _ = train_steps(start, inputs[:step], targets[:step], AdamW, logits_of)
        targets[step] = logits_of(so_far, inputs[step]).argmax(-1)
    final, log = train_steps(start, inputs, targets, AdamW, logits_of)
    check, _ = train_steps(start, inputs, targets, TorchAdamW, logits_of)
    single, single_log = train_steps(params, inputs, targets, AdamW, logits_of)
    for name in final:
        require(relative(check[name], final[name]) < 1e-12, f"torch.optim.AdamW differs in {name}")
    clipped = sum(row["clip_coefficient"] < 1 for row in log)
    print(f"{version}, ten steps: gradient norms " + " ".join(f"{row['grad_norm']:.3f}" for row in log))
    require(3 <= clipped <= 7, f"{clipped} of ten steps are clipped; wanted some, not all")
    # What fp32 costs the same maths: a test of an fp32 trainer is told by this what is rounding.
    moved = {name: final[name] - start[name] for name in final}
    rounding = {
        "loss_max": max(abs(a["loss"] - b["loss"]) for a, b in zip(log, single_log)),
        "grad_norm_max": max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(log, single_log)),
        "weight_max": max((single[n].double() - final[n]).abs().max().item() for n in final),
        "moved_relative_l2_max": max(relative(single[n].double() - start[n], moved[n])
                                     for n in final),
    }
    print(f"{version}, ten steps: {clipped} clipped; the same in fp32 is off by {rounding}")
    report = {"settings": c, "steps": log, "fp32_rounding": rounding}
    values = {"inputs": inputs, "targets": targets} | as_f32(final, "final.")
    return {version + "_ten_steps": values}, report


# ---- The wkv op alone --------------------------------------------------------------------------


def wkv4_by_definition(w, u, k, v, state):
    """(y, numerator, denominator after the last step) as the sums of the definition, no scaling.

    numpy long double reaches e^11356, so nothing here overflows where fp32 and fp64 would."""
    seq_len = k.shape[1]
    first_a, first_b = state[:, 0] * np.exp(state[:, 2]), state[:, 1] * np.exp(state[:, 2])

    def sums(t):
        a, b = np.exp(t * w) * first_a, np.exp(t * w) * first_b
        for i in range(t):
            weight = np.exp((t - 1 - i) * w + k[:, i])
            a, b = a + weight * v[:, i], b + weight
        return a, b

    y = np.empty_like(k)
    for t in range(seq_len):
        a, b = sums(t)
        now = np.exp(u + k[:, t])
        y[:, t] = (a + now * v[:, t]) / (b + now)
    return (y, *sums(seq_len))


def wkv4_case(inputs, state, dy, dfinal):
    """Outputs and gradients of sum(y dy) + sum(final aa, bb times dfinal), pp held constant."""
    tensors = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    scaled = state[:, :2].clone().requires_grad_()
    y, final = ref.wkv4(*tensors.values(), torch.cat([scaled, state[:, 2:]], 1))
    objective = (y * dy).sum() + (final[:, :2] * dfinal).sum()
    gradients = torch.autograd.grad(objective, [*tensors.values(), scaled])
    values = {"state_B3A": state, "y_BTA": y.detach(), "final_B3A": final.detach()}
    values |= {"d" + name: g for name, g in zip([*tensors, "state_B2A"], gradients)}

    # The same from the definition, its gradients from central differences.
    wide = [value.numpy().astype(np.longdouble) for value in [*inputs.values(), state]]
    scale = np.exp(values["final_B3A"][:, 2].numpy().astype(np.longdouble))

    def outputs():
        y, a, b = wkv4_by_definition(*wide)
        return y, a / scale, b / scale

    y_wide, a_wide, b_wide = outputs()
    for name, found, expected in [("y", values["y_BTA"], y_wide),
                                  ("aa", values["final_B3A"][:, 0], a_wide),
                                  ("bb", values["final_B3A"][:, 1], b_wide)]:
        error = np.abs(found.numpy() - expected).max()
        require(error < 1e-12 * max(1, np.abs(expected).max()), f"wkv4 {name} is off by {error}")
    names = ["dw_log_A", "du_A", "dk_BTA", "dv_BTA", "dstate_B2A"]
    for name, argument in zip(names, wide):
        expected = np.zeros_like(argument)
        for index in np.ndindex(argument.shape):
            if name == "dstate_B2A" and index[1] == 2:
                continue
            middle, sides = argument[index], []
            h = np.longdouble(1e-6) * max(1, min(abs(middle), 1e3))
            for sign in (+1, -1):
                argument[index] = middle + sign * h
                y_h, a_h, b_h = outputs()
                sides.append((y_h * dy.numpy()).sum() + (a_h * dfinal[:, 0].numpy()).sum()
                             + (b_h * dfinal[:, 1].numpy()).sum())
            argument[index] = middle
            expected[index] = (sides[0] - sides[1]) / (2 * h)
        expected = expected[:, :2] if name == "dstate_B2A" else expected
        error = np.abs(values[name].numpy() - expected)
        require((error <= 1e-8 * (1 + np.abs(expected))).all(), f"{name} is off by {error.max()}")
    return values


def wkv4_files():
    rng = np.random.default_rng(6)

    def f32(array):
        # fp32 numbers held as fp64: a kernel in either sees the same inputs.
        return torch.tensor(np.asarray(array), dtype=torch.float32).double()

    k = rng.normal(0, 1.5, (2, 19, 5))
    # e^(u+k) beyond fp32 at both ends, neighbours apart by more than fp32 can hold at once.
    k[1] = rng.uniform(-60, 60, (19, 5))
    k[1, 4], k[1, 11], k[1, 12] = 95.0, -95.0, 60.0
    inputs = {
        "w_log_A": f32([-1e-4, -0.05, -0.7, -6.0, -30.0]),
        "u_A": f32([0.3, -1.2, 12.0, -12.0, 1.5]),
        "k_BTA": f32(k),
        "v_BTA": f32(rng.normal(0, 1, (2, 19, 5))),
    }
    dy, dfinal = f32(rng.normal(0, 1, (2, 19, 5))), f32(rng.normal(0, 1, (2, 2, 5)))
    carried = np.stack([rng.normal(0, 1, (2, 5)), rng.uniform(0.5, 2.0, (2, 5)),
                        [[0.5, -1.0, 2.0, 0.0, 1.0], [70.0, -80.0, 3.0, 40.0, -1e38]]], 1)
    # One channel of a carried state that has seen nothing yet.
    carried[1, :2, 4] = 0.0
    values = dict(inputs) | {"dy_BTA": dy, "dfinal_B2A": dfinal}
    for case, state in [("carried", f32(carried)),
                        ("fresh", f32(ref.fresh_wkv_state(2, 5, torch.float32)))]:
        results = wkv4_case(inputs, state, dy, dfinal)
        values |= {f"{case}.{name}": value for name, value in results.items()}
    print("wkv4: equals its definition in long double, gradients equal central differences")
    return {"wkv4": values}


# ---- Against data made by others ---------------------------------------------------------------


def check_against_test_data():
    root = os.environ.get("ROOKERY_TEST_DATA")
    if not root:
        print("ROOKERY_TEST_DATA is not set: its synthetic models are not compared")
        return
    for prefix, length, logits_of in [("rwkv4_synthetic/", 20, ref.logits_of),
                                      ("rwkv567_synthetic/v7_", 16, rwkv7_reference.logits_of)]:
        check_against_synthetic(f"{root}/derived/{prefix}", prefix, length, logits_of)


def check_against_synthetic(path, name, length, logits_of):
    load = lambda file: torch.load(path + file, weights_only=True)
    params = as_f64(load("weights_fp32.pth"))
    tokens = torch.tensor(np.fromfile(f"{path}tokens_i32_2x{length + 1}.bin", np.int32)).long()
    inputs, targets = tokens.view(2, -1)[:, :-1], tokens.view(2, -1)[:, 1:]
    logits = torch.tensor(np.fromfile(f"{path}logits_f64_2x{length}x48.bin")).view(2, length, 48)
    difference = (logits_of(params, inputs) - logits).abs().max().item()
    require(difference < 1e-10, f"logits of {name} differ by {difference:.1e}")
    worst = 0.0
    for file, factor in [("grads_ce_fp32.pth", 0.0), ("grads_ce_l2wrap_fp32.pth", L2WRAP)]:
        _, gradients = ref.loss_and_gradients(params, inputs, targets, factor, logits_of)
        expected = load(file)
        require(expected.keys() == gradients.keys(), f"{file} has other names")
        worst = max([worst] + [relative(gradients[key], expected[key]) for key in expected])
    require(worst < 1e-6, f"gradients of {name} differ by {worst:.1e}")
    print(f"{name}: logits within {difference:.1e}, gradients within {worst:.1e} (fp32)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write none")
    check = parser.parse_args().check
    # One thread: sums in one order, so that the files come out the same again.
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}"
                         for name in ("torch", "numpy", "rwkv", "safetensors"))
    versions += f", python {sys.version.split()[0]}"
    print(versions)
    check_against_test_data()

    files = odd_model_files() | wide_att_files()
    files |= gradient_files(files["rwkv4_odd"]) | wkv4_files()
    files["rwkv7_odd"] = random_rwkv7(seed=17, n_layer=3, vocab_size=61, n_embd=40, head_size=20,
                                      dim_ffn=72, ranks={"w": 6, "a": 5, "v": 4, "g": 7})
    require_every_tensor_matters(files["rwkv7_odd"], random_tokens(71, 61, 1, 37),
                                 rwkv7_reference.logits_of)
    reports = {}
    for version, logits_of in [("rwkv4", ref.logits_of), ("rwkv7", rwkv7_reference.logits_of)]:
        ten_steps, reports[version] = ten_step_files(version, files[version + "_odd"], logits_of)
        files |= ten_steps

    for name, tensors in files.items():
        path = FOLDER / (name + ".safetensors")
        if not check:
            # One entry: of several, safetensors writes the order of a hash table, another each time.
            save_file({key: value.contiguous() for key, value in tensors.items()}, path,
                      {"made_by": f"scripts/make_golden.py; {versions}"})
            path.chmod(0o644)
            continue
        there = load_file(path)
        require(there.keys() == tensors.keys(), f"{path} holds other tensors than would be made")
        for key, value in tensors.items():
            require(there[key].dtype == value.dtype and there[key].shape == value.shape
                    and relative(there[key], value) < 1e-6, f"{path}: {key} differs")
    for version, report in reports.items():
        path = FOLDER / (version + "_ten_steps.json")
        if not check:
            path.write_text(json.dumps(report, indent=1) + "\n")
            continue
        for row, there in zip(report["steps"], json.loads(path.read_text())["steps"]):
            for key, value in row.items():
                require(math.isclose(value, there[key], rel_tol=1e-9), f"{path}: {key} differs")
    print(("equal to " if check else "written to ") + str(FOLDER))


if __name__ == "__main__":
    main()
