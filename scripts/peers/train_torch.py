#!/usr/bin/env python3
"""Training throughput beside PyTorch, in one run: the models of `longspan bench train` written in PyTorch, and the two
operations behind long mixers. The programs take turns, so that a busy machine slows both.

    python scripts/peers/train_torch.py target/release/longspan [--threads 2] [--rounds 2] [--device cpu|cuda]
        [--numbers f32|tf32|bf16] [--what ...]
"""
import argparse
import json
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH = 256, 320


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, heads=5, inner=864):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = RmsNorm(WIDTH, 1e-6), RmsNorm(WIDTH, 1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * inner, bias=False)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def rotate(z):
            a, c = z.chunk(2, -1)
            return z * cos + torch.cat((-c, a), -1) * sin

        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(self.n2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, layers=8):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = RmsNorm(WIDTH, 1e-6)

    def forward(self, ids):
        t, half = ids.shape[1], 32
        freq = 10000.0 ** (-torch.arange(half, device=ids.device) / half)
        angle = torch.outer(torch.arange(t, device=ids.device), freq).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ self.embed.weight.T


def ssd(x, dt, a, b, c, chunk=64):
    """Chunked scan in matrix form, as in the Mamba-2 paper's listing. x [B,L,H,P], dt [B,L,H], a [H], b and c [B,L,N]."""
    batch, length, heads, p = x.shape
    n, q = b.shape[-1], chunk
    k = length // q
    x = (x * dt[..., None]).view(batch, k, q, heads, p)
    log = (dt * a).view(batch, k, q, heads).permute(0, 3, 1, 2)  # [B,H,K,Q]
    b, c = b.view(batch, k, q, n), c.view(batch, k, q, n)
    sums = log.cumsum(-1)
    lower = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    scores = torch.einsum("bkin,bkjn->bkij", c, b)[:, None] * decay
    y = torch.einsum("bhkij,bkjhp->bkihp", scores, x)
    to_end = (sums[..., -1:] - sums).exp()
    states = torch.einsum("bkjn,bhkj,bkjhp->bkhpn", b, to_end, x)
    state, before = torch.zeros_like(states[:, 0]), []
    for i in range(k):
        before.append(state)
        state = state * sums[:, :, i, -1].exp()[..., None, None] + states[:, i]
    before = torch.stack(before, 1)
    y = y + torch.einsum("bkin,bkhpn,bhki->bkihp", c, before, sums.exp())
    return y.reshape(batch, length, heads, p)


class Mamba2(nn.Module):
    def __init__(self, n=64, head=64, taps=4):
        super().__init__()
        self.inner, self.n, self.head, self.heads = 2 * WIDTH, n, head, 2 * WIDTH // head
        wide = self.inner + 2 * n
        self.norm_in = RmsNorm(WIDTH, 1e-5)
        self.in_proj = nn.Linear(WIDTH, self.inner + wide + self.heads, bias=False)
        self.conv = nn.Conv1d(wide, wide, taps, groups=wide, padding=taps - 1)
        self.dt_bias = nn.Parameter(torch.full((self.heads,), -4.0))
        self.a_log = nn.Parameter(torch.arange(1, self.heads + 1).float().log())
        self.d = nn.Parameter(torch.ones(self.heads))
        self.norm = RmsNorm(self.inner, 1e-5)
        self.out_proj = nn.Linear(self.inner, WIDTH, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        z, xbc, dt = self.in_proj(self.norm_in(x)).split([self.inner, self.inner + 2 * self.n, self.heads], -1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :t].transpose(1, 2))
        u, wb, wc = xbc.split([self.inner, self.n, self.n], -1)
        u = u.reshape(b, t, self.heads, self.head)
        y = ssd(u, F.softplus(dt + self.dt_bias), -self.a_log.exp(), wb, wc) + u * self.d[:, None]
        return x + self.out_proj(self.norm(y.reshape(b, t, -1) * F.silu(z)))


class MambaLm(nn.Module):
    def __init__(self, layers=15):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Mamba2() for _ in range(layers))
        self.norm = RmsNorm(WIDTH, 1e-5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


def sync(device):
    if device != "cpu":
        torch.cuda.synchronize()


def timed(steps, device, f):
    seconds = []
    warm = 1 if device == "cpu" else 5
    for step in range(steps + warm):
        sync(device)
        start = time.perf_counter()
        f()
        sync(device)
        if step >= warm:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def training(model, args):
    model = model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    ids = torch.randint(VOCAB, (args.documents, args.length), device=args.device)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=args.numbers == "bf16"):
            logits = model(ids).float()
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    count = sum(p.numel() for p in model.parameters())
    return count, timed(args.steps, args.device, step), args.documents * args.length


def fft_conv(args):
    b, h, l = 4, 256, 4096
    u = torch.rand(b, h, l, device=args.device, requires_grad=True)
    k = torch.rand(h, l, device=args.device, requires_grad=True)

    def step():
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * l) * torch.fft.rfft(k, 2 * l), 2 * l)[..., :l]
        y.square().sum().backward()

    return 0, timed(args.steps, args.device, step), b * l


def scan(args):
    b, l, h, p, n = 2, 2048, 8, 64, 64
    like = dict(device=args.device, requires_grad=True)
    x, dt, a = torch.rand(b, l, h, p, **like), torch.rand(b, l, h, **like), torch.rand(h, **like)
    wb, wc = torch.rand(b, l, n, **like), torch.rand(b, l, n, **like)

    def step():
        ssd(x, 0.01 + 0.09 * dt, -0.5 - a, wb, wc).square().sum().backward()

    return 0, timed(args.steps, args.device, step), b * l


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("longspan")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--numbers", choices=["f32", "tf32", "bf16"], default="f32", help="of both programs; torch: autocast for bf16")
    parser.add_argument("--what", default="transformer,mamba2,fft-conv,scan")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = args.numbers == "tf32"
    peers = {
        "transformer": lambda: training(Transformer(), args),
        "mamba2": lambda: training(MambaLm(), args),
        "fft-conv": lambda: fft_conv(args),
        "scan": lambda: scan(args),
    }
    print(f"torch {torch.__version__}, {args.threads} threads, {args.device}, {args.numbers}")
    for what in args.what.split(","):
        ours, theirs = [], []
        for _ in range(args.rounds):
            command = [args.longspan, "bench", "train", "--json", "--what", what, "--threads", str(args.threads)]
            command += ["--documents", str(args.documents), "--length", str(args.length), "--steps", str(args.steps)]
            command += ["--device", args.device, "--numbers", args.numbers]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            ours.append(row["tokens_per_second"])
            count, seconds, tokens = peers[what]()
            theirs.append(tokens / seconds)
        ratio = statistics.median(ours) / statistics.median(theirs)
        sizes = f"  parameters {row['parameters']:,} and {count:,}" if count else ""
        print(
            f"{what:<12} longspan {statistics.median(ours):>9.0f} tokens/s  torch {statistics.median(theirs):>9.0f} tokens/s"
            f"  ratio {ratio:.2f}{sizes}",
            flush=True,
        )


if __name__ == "__main__":
    main()
