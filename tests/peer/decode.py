"""Peer baseline: token-by-token decode of a SUPRA-shaped 7B model in PyTorch, compiled and captured in a CUDA graph.

Same shapes as step.py; recurrent state in float32 (one [heads, 128, 128] matrix per layer and sequence), weights in
bfloat16, greedy next token inside the graph. Variants: read-out as a batched matmul; read-out as a fused multiply-sum with
inductor's coordinate-descent tuning. Also a softmax model of the same shape with a static KV cache at a given
context. Prints one JSON line per variant: tokens/s over all sequences, and the share of the bandwidth bound
(weights + state read and written once per token, at 4.3e12 bytes/s).

Run: python decode.py [--batches 1,16,64,256] [--ctx 2048] [--layers 32] [--steps 64]
"""
import argparse, json, math, time
import torch, torch._inductor.config, torch.nn as nn, torch.nn.functional as F

H, NH, KV, D, FF, V = 4096, 32, 8, 128, 14336, 32000
FUSED = False

def slopes(n):
    r = 2 ** (-(2 ** -(math.log2(n) - 3)))
    return torch.tensor([r * r ** i for i in range(n)])

def rms(x, w): return F.rms_norm(x, (x.shape[-1],), w, 1e-5)

def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin

class Block(nn.Module):
    def __init__(s, softmax):
        super().__init__(); s.softmax = softmax
        s.n1, s.n2 = nn.Parameter(torch.ones(H)), nn.Parameter(torch.ones(H))
        s.qkv = nn.Linear(H, (NH + 2 * KV) * D, bias=False); s.o = nn.Linear(NH * D, H, bias=False)
        if not softmax: s.fq, s.fk = nn.Linear(NH * D, NH * D), nn.Linear(KV * D, KV * D)
        s.w12 = nn.Linear(H, 2 * FF, bias=False); s.w3 = nn.Linear(FF, H, bias=False)
    def forward(s, x, cos, sin, gamma, state, pos, mask):
        B = x.shape[0]
        q, k, v = s.qkv(rms(x, s.n1)).split([NH * D, KV * D, KV * D], -1)
        if not s.softmax: q, k = F.relu(s.fq(q)), F.relu(s.fk(k))
        q, k, v = rope(q.view(B, NH, D), cos, sin), rope(k.view(B, KV, D), cos, sin), v.view(B, KV, D)
        if s.softmax:
            kc, vc = state
            kc.index_copy_(2, pos, k[:, :, None]); vc.index_copy_(2, pos, v[:, :, None])
            o = F.scaled_dot_product_attention(q[:, :, None], kc, vc, attn_mask=mask, enable_gqa=True).reshape(B, NH * D)
        else:
            k = k.repeat_interleave(NH // KV, 1).float() * D ** -0.5; v = v.repeat_interleave(NH // KV, 1).float()
            u = state + k[..., :, None] * v[..., None, :]
            o = (q.float()[..., None] * u).sum(-2) if FUSED else (q.float()[..., None, :] @ u)[..., 0, :]
            state.copy_(u * gamma)
            o = F.layer_norm(o, (D,), eps=1e-5).to(x.dtype).reshape(B, NH * D)
        x = x + s.o(o)
        a, b = s.w12(rms(x, s.n2)).chunk(2, -1)
        return x + s.w3(F.silu(a) * b)

class Model(nn.Module):
    def __init__(s, layers, softmax):
        super().__init__(); s.emb = nn.Embedding(V, H); s.blocks = nn.ModuleList(Block(softmax) for _ in range(layers))
        s.norm = nn.Parameter(torch.ones(H)); s.head = nn.Linear(H, V, bias=False)
    def forward(s, ids, pos, states, cos_t, sin_t, gamma, mask):
        x = s.emb(ids); cos, sin = cos_t[pos], sin_t[pos]
        for b, st in zip(s.blocks, states): x = b(x, cos, sin, gamma, st, pos, mask)
        ids.copy_(s.head(rms(x, s.norm)).argmax(-1)); pos.add_(1)

@torch.no_grad()
def run(a, softmax, batch):
    torch.cuda.empty_cache(); dev = 'cuda'
    with torch.device(dev):
        torch.set_default_dtype(torch.bfloat16); m = Model(a.layers, softmax); torch.set_default_dtype(torch.float32)
        for p in m.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=0.02)
        t = torch.arange(a.ctx + 8192).float(); e = torch.outer(t, 10000 ** (-torch.arange(0, D, 2).float() / D)).repeat(1, 2)
        cos, sin = e.cos().bfloat16()[:, None, :], e.sin().bfloat16()[:, None, :]
        gamma = torch.exp(-slopes(NH).to(dev)).view(1, NH, 1, 1)
        ids, pos = torch.randint(V, (batch,)), torch.tensor([a.ctx - 128])
        mask = torch.ones(1, 1, 1, a.ctx, dtype=torch.bool)
        states = [((torch.randn(batch, KV, a.ctx, D, dtype=torch.bfloat16), torch.randn(batch, KV, a.ctx, D, dtype=torch.bfloat16)) if softmax
                   else torch.zeros(batch, NH, D, D)) for _ in range(a.layers)]
    step = torch.compile(m.forward)
    def go(): step(ids, pos, states, cos, sin, gamma, mask)
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): go(); pos.fill_(a.ctx - 128)
    torch.cuda.current_stream().wait_stream(side)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): go()
    pos.fill_(a.ctx - 128); times = []
    for _ in range(3):
        pos.fill_(a.ctx - 128); torch.cuda.synchronize(); t0 = time.time()
        for _ in range(a.steps): g.replay()
        torch.cuda.synchronize(); times.append((time.time() - t0) / a.steps)
    s = sorted(times)[1]; n = sum(p.numel() for p in m.parameters()) - V * H
    per_seq = a.layers * (2 * KV * a.ctx * D * 2 if softmax else 2 * NH * D * D * 4)
    bound = 4.3e12 / (2 * n + batch * per_seq) * batch
    print(json.dumps(dict(variant=('softmax ctx %d' % a.ctx) if softmax else ('supra recurrent, fused' if FUSED else 'supra recurrent'), batch=batch, ms=round(s * 1e3, 3), tok_s=round(batch / s), bound_tok_s=round(bound), share=round(batch / s / bound, 3))), flush=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('--batches', default='1,16,64,256'); p.add_argument('--ctx', type=int, default=2048)
    p.add_argument('--layers', type=int, default=32); p.add_argument('--steps', type=int, default=64); p.add_argument('--only', default='')
    a = p.parse_args()
    for softmax, FUSED in ((False, False), (False, True), (True, True)):
        torch._inductor.config.coordinate_descent_tuning = FUSED
        for b in map(int, a.batches.split(',')):
            if a.only and a.only != ('softmax' if softmax else 'fused' if FUSED else 'supra'): continue
            try: run(a, softmax, b)
            except Exception as ex: print(json.dumps(dict(softmax=softmax, batch=b, error=repr(ex)[:300])), flush=True)
            torch._dynamo.reset()
