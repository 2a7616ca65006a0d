"""The peer of `scripts/prove step`: one SUPRA-shaped 7B micro-batch in PyTorch with the field's best public kernels.

Shapes follow the Mistral-7B linear configuration (hidden 4096, 32 layers, 32 heads, 8 kv heads, ffn 14336,
vocab 32000). Attention: flash-linear-attention's chunk_simple_gla with a fixed per-head decay; the loss: Liger kernels;
blocks compiled. Prints one JSON line per variant: tokens/s of forward and backward, and model FLOPs utilisation
against 989 TFLOP/s dense bf16 (46.39 GFLOP per token at these shapes; recomputation not counted).

--main-grad accumulates gradients in float32 (a hook per parameter after its gradient is ready); --docs N gives every
sequence N random document starts (state and decay reset there). --export DIR writes weights, tokens, loss and gradient
norm of one pass, for `supra-worker bench step --model DIR --tokens DIR/tokens.safetensors`.

Needs torch, flash-linear-attention, liger-kernel and safetensors.
Run: python step.py [--batch 4] [--seq 2048] [--layers 32] [--steps 10] [--main-grad] [--docs 0] [--only 'supra fla compiled']
"""
import argparse, json, math, time
import torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from fla.ops.simple_gla import chunk_simple_gla
from fla.modules.norm.layernorm import group_norm
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

H, L, NH, KV, D, FF, V = 4096, 32, 32, 8, 128, 14336, 32000

def slopes(n):
    r = 2 ** (-(2 ** -(math.log2(n) - 3)))
    return torch.tensor([r * r ** i for i in range(n)])

class RMS(nn.Module):
    def __init__(s, d, kernel): super().__init__(); s.weight = nn.Parameter(torch.ones(d)); s.kernel = kernel
    def forward(s, x):
        if s.kernel: return LigerRMSNormFunction.apply(x, s.weight, 1e-5, 0.0, 'llama', False, None)
        return F.rms_norm(x, (x.shape[-1],), s.weight, 1e-5)

def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin

class Block(nn.Module):
    def __init__(s, kernel, softmax=False):
        super().__init__()
        s.n1, s.n2, s.kernel, s.softmax = RMS(H, kernel), RMS(H, kernel), kernel, softmax
        s.qkv = nn.Linear(H, (NH + 2 * KV) * D, bias=False); s.o = nn.Linear(NH * D, H, bias=False)
        if not softmax: s.fq = nn.Linear(NH * D, NH * D); s.fk = nn.Linear(KV * D, KV * D)
        s.w12 = nn.Linear(H, 2 * FF, bias=False); s.w3 = nn.Linear(FF, H, bias=False)
    def forward(s, x, cos, sin, lg, cu):
        B, T, _ = x.shape
        q, k, v = s.qkv(s.n1(x)).split([NH * D, KV * D, KV * D], -1)
        if not s.softmax: q, k = F.relu(s.fq(q)), F.relu(s.fk(k))
        q, k, v = q.view(B, T, NH, D), k.view(B, T, KV, D), v.view(B, T, KV, D)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if s.softmax:
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True).transpose(1, 2).reshape(B, T, NH * D)
        else:
            k = k[:, :, :, None].expand(B, T, KV, NH // KV, D).reshape(B, T, NH, D)
            v = v[:, :, :, None].expand(B, T, KV, NH // KV, D).reshape(B, T, NH, D)
            if cu is None: o, _ = chunk_simple_gla(q, k, v, g_gamma=lg, scale=D ** -0.5)
            else: o, _ = chunk_simple_gla(q.reshape(1, B * T, NH, D), k.reshape(1, B * T, NH, D), v.reshape(1, B * T, NH, D), g_gamma=lg, scale=D ** -0.5, cu_seqlens=cu)
            o = F.layer_norm(o.view(B * T, NH, D), (D,), eps=1e-5).view(B, T, NH * D)
        x = x + s.o(o)
        a, b = s.w12(s.n2(x)).chunk(2, -1)
        return x + s.w3(LigerSiLUMulFunction.apply(a.contiguous(), b.contiguous()) if s.kernel else F.silu(a) * b)

class Model(nn.Module):
    def __init__(s, layers, kernel, softmax):
        super().__init__()
        s.emb = nn.Embedding(V, H); s.blocks = nn.ModuleList(Block(kernel, softmax) for _ in range(layers))
        s.norm = RMS(H, kernel); s.head = nn.Linear(H, V, bias=False); s.loss = LigerFusedLinearCrossEntropyLoss()
    def forward(s, ids, y, cos, sin, lg, cu, ckpt):
        x = s.emb(ids)
        for i, b in enumerate(s.blocks):
            x = checkpoint(b, x, cos, sin, lg, cu, use_reentrant=False) if ckpt else b(x, cos, sin, lg, cu)
        return s.loss(s.head.weight, s.norm(x).view(-1, H), y.view(-1))

def run(name, a, kernel, softmax, ckpt, compiled):
    torch.manual_seed(0); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    with torch.device('cuda'):
        torch.set_default_dtype(torch.bfloat16); m = Model(a.layers, kernel, softmax); torch.set_default_dtype(torch.float32)
        for p in m.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=0.02)
        t = torch.arange(a.seq, device='cuda').float(); f = 10000 ** (-torch.arange(0, D, 2, device='cuda').float() / D)
        e = torch.outer(t, f).repeat(1, 2)[None, :, None, :]; cos, sin = e.cos().bfloat16(), e.sin().bfloat16()
        lg = -slopes(NH).cuda().float(); ids = torch.randint(V, (a.batch, a.seq), device='cuda'); y = torch.randint(V, (a.batch, a.seq), device='cuda')
    cu = None
    if a.docs:
        starts = [b * a.seq + x for b in range(a.batch) for x in [0] + sorted(torch.randperm(a.seq - 1)[:a.docs - 1].add(1).tolist())]
        cu = torch.tensor(starts + [a.batch * a.seq], device='cuda', dtype=torch.long)
    if a.main_grad:
        def add(p):
            if not hasattr(p, 'main_grad'): p.main_grad = torch.zeros_like(p, dtype=torch.float32)
            p.main_grad.add_(p.grad); p.grad = None
        for p in m.parameters(): p.register_post_accumulate_grad_hook(add)
    if compiled:
        for b in m.blocks: b.compile()
    n = sum(p.numel() for p in m.parameters()); ts = []
    for i in range(a.steps + 3):
        torch.cuda.synchronize(); t0 = time.time()
        ids.random_(0, V); loss = m(ids, y, cos, sin, lg, cu, ckpt); loss.backward()
        torch.cuda.synchronize(); ts.append(time.time() - t0)
    s = sorted(ts[3:])[len(ts[3:]) // 2]; tok = a.batch * a.seq
    print(json.dumps(dict(variant=name, params=n, batch=a.batch, seq=a.seq, ms=round(s * 1e3, 1), tok_s=round(tok / s), mfu=round((46.39e9 if a.layers == 32 and not softmax else 6 * n) * tok / s / 989e12, 4), main_grad=bool(a.main_grad), docs=a.docs, peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1), loss=round(loss.item(), 3))), flush=True)
    del m

def export(a):
    """One pass of an eager model with its weights, tokens, loss and gradient norm, in the published names."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    with torch.device('cuda'):
        torch.set_default_dtype(torch.bfloat16); m = Model(a.layers, 1, 0); torch.set_default_dtype(torch.float32)
        for p in m.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=0.02)
        t = torch.arange(a.seq).float(); f = 10000 ** (-torch.arange(0, D, 2).float() / D)
        e = torch.outer(t, f).repeat(1, 2)[None, :, None, :]; cos, sin = e.cos().bfloat16(), e.sin().bfloat16()
        ids = torch.randint(V, (a.batch, a.seq)); y = torch.randint(V, (a.batch, a.seq))
    loss = m(ids, y, cos, sin, -slopes(NH).cuda().float(), None, 0); loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in m.parameters()))
    parts = {'n1': 'attention_norm', 'qkv': 'attention.in_proj', 'fq': 'attention._totrain_embed', 'fk': 'attention._totrain_embed_kv', 'o': 'attention.out_proj', 'n2': 'ffn_norm', 'w12': 'feed_forward.w12', 'w3': 'feed_forward.w3'}
    def name(n):
        n = n.split('.')
        if n[0] != 'blocks': return {'emb': 'tok_embeddings', 'norm': 'norm', 'head': 'output'}[n[0]] + '.weight'
        return f'layers.{n[1]}.{parts[n[2]]}.{n[3]}'
    import os; os.makedirs(a.export, exist_ok=True)
    save_file({name(n): p.detach().contiguous() for n, p in m.named_parameters()}, f'{a.export}/model.safetensors')
    save_file({'inputs': ids, 'targets': y}, f'{a.export}/tokens.safetensors')
    json.dump(dict(architectures=['OpenLMForCausalLM'], model_type='openlm', dim=H, intermediate_dim_ffn=FF, n_layers=a.layers, n_heads=NH, n_heads_kv=KV, vocab_size=V, norm_eps=1e-5, seq_len=a.seq, weight_tying=False, apply_qk_norm=False, norm_type='rms_norm', attn_name='linear_attn', positional_embedding_type='rotary', ffn_type='swiglu', use_decay=True, use_retnet_slopes=False, decay_start=None), open(f'{a.export}/config.json', 'w'))
    print(json.dumps(dict(variant='export', layers=a.layers, loss=loss.item(), gradient_norm=norm)))

if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('--batch', type=int, default=4); p.add_argument('--seq', type=int, default=2048)
    p.add_argument('--layers', type=int, default=32); p.add_argument('--steps', type=int, default=10); p.add_argument('--only', default=''); p.add_argument('--main-grad', action='store_true'); p.add_argument('--docs', type=int, default=0)
    p.add_argument('--export', default='')
    a = p.parse_args()
    if a.export:
        export(a); raise SystemExit
    for name, kernel, softmax, ckpt, comp in [('supra fla+liger eager', 1, 0, 0, 0), ('supra fla+liger eager, checkpointed', 1, 0, 1, 0), ('supra fla compiled', 0, 0, 0, 1), ('supra fla compiled, checkpointed', 0, 0, 1, 1), ('softmax compiled', 0, 1, 0, 1)]:
        if a.only and a.only != name: continue
        try: run(name, a, kernel, softmax, ckpt, comp)
        except Exception as ex: print(json.dumps(dict(variant=name, error=repr(ex)[:300])), flush=True)
