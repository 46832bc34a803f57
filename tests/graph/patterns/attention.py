"""Attention: whole heads, the width within each head, and everything that hard-codes both."""

import torch
from torch import nn
from torch.nn import functional as F

from patterns.base import pattern

TOKENS = (2, 5, 8)  # (batch, tokens, features)


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class Separate(nn.Module):  # 2 heads of width 3; the product with the keys ties q and k
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 6) for _ in range(3))
        self.o = nn.Linear(6, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.o(x.transpose(1, 2).reshape(n, t, 6))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class ByMatmul(nn.Module):  # the scale is a number in the forward and stays
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 6) for _ in range(3))
        self.o = nn.Linear(6, 4)

    def forward(self, x):
        n, t = x.shape[:2]
        q, k, v = (f(x).view(n, t, 2, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (torch.matmul(q, k.transpose(-1, -2)) / 3**0.5).softmax(-1)
        return self.o((a @ v).transpose(1, 2).flatten(2))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3)])
class FusedQKV(nn.Module):  # timm's ViT: (3, heads, width) gives all three the same widths
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 18), nn.Linear(6, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.o(x.transpose(1, 2).reshape(n, t, 6))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class FusedChunks(nn.Module):  # GPT-2: chunks first, heads then; 3 widths of q and k, 3 of v
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 18), nn.Linear(6, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (p.view(n, t, 2, 3).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(x.transpose(1, 2).contiguous().view(n, t, 6))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 4), ("inner", 4), ("channels", 8)])
class SelfAttention(nn.Module):  # 4 widths of q and k, 4 of v; what out_proj writes is free
    def __init__(self):
        super().__init__()
        self.mha, self.o = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.o(self.mha(x, x, x, need_weights=False)[0])


@pattern(TOKENS, (2, 3, 6), kinds=[("outer", 2), ("inner", 4), ("inner", 4)])
class CrossAttention(nn.Module):  # keys and values have another width
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.o = nn.Linear(8, 4)

    def forward(self, x, y):
        return self.o(self.mha(x, y, y)[0])


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class GroupedQuery(nn.Module):  # 4 query heads share 2 key heads, each key head goes with its two
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o = nn.Linear(12, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 3).transpose(1, 2) for f in (self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.o(x.transpose(1, 2).reshape(n, t, 12))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class ExpandedKeys(nn.Module):  # the same as Llama's repeat_kv writes it: expand, then reshape
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o = nn.Linear(12, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, 3).transpose(1, 2) for f in (self.k, self.v))
        k, v = (y[:, :, None].expand(n, 2, 2, t, 3).reshape(n, 4, t, 3) for y in (k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.o(x.transpose(1, 2).reshape(n, t, -1))


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 3), ("inner", 3)])
class ByEinsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 6) for _ in range(3))
        self.o = nn.Linear(6, 4)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, 3) for f in (self.q, self.k, self.v))
        a = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(dim=-1)
        return self.o(torch.einsum("nhqk,nkhd->nqhd", a, v).reshape(n, t, 6))


# Windows of 2 x 2 in a 4 x 4 map, shifted, with a bias for each head and pair of positions.
@pattern((2, 4, 4, 8), kinds=[("outer", 2)])
class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 18), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("place", torch.arange(16) % 9)

    def forward(self, x):
        n = x.shape[0]
        x = torch.roll(x, (-1, -1), (1, 2)).view(n, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n * 4, 4, 8)
        qkv = self.qkv(x).reshape(n * 4, 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * 3**-0.5, qkv[1], qkv[2]
        bias = self.table[self.place].view(4, 4, -1).permute(2, 0, 1).contiguous()
        a = F.softmax(q.matmul(k.transpose(-2, -1)) + bias.unsqueeze(0), dim=-1)
        x = self.o(a.matmul(v).transpose(1, 2).reshape(n * 4, 4, 6))
        x = x.view(n, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, 4)
        return torch.roll(x, (1, 1), (1, 2))


@pattern(TOKENS, kinds=[("outer", 2)], masked=False)
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.o = nn.Linear(8, 4)

    def forward(self, x):
        return self.o(self.layer(x))


@pattern((2, 3, 8, 8), kinds=[("outer", 2), ("channels", 7)], masked=False)
class VisionTransformer(nn.Module):  # patches, class token, positions, one block
    def __init__(self):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.randn(1, 1, 6))
        self.pos, self.n1, self.n2 = (
            nn.Parameter(torch.randn(1, 5, 6)),
            nn.LayerNorm(6),
            nn.LayerNorm(6),
        )
        self.qkv, self.o = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        y = self.qkv(self.n1(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(y[0], y[1], y[2])
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.head(x[:, 0])


@pattern(TOKENS, kinds=[("outer", 2), ("inner", 2), ("inner", 4)])
class Rotary(nn.Module):  # positions turn pairs of widths of q and k: d and d + 2 of 4
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.o = nn.Linear(8, 4)
        self.register_buffer("cos", torch.rand(5, 4))
        self.register_buffer("sin", torch.rand(5, 4))

    def turn(self, x):
        half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
        return x * self.cos + half * self.sin

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.o(x.transpose(1, 2).reshape(n, t, 8))


@pattern((2, 3, 6, 6), free={"q.weight": (4, 2 * 4), "v.weight": (5, 4 + 3)})
class NonLocal(nn.Module):  # attention over pixels, no heads
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.v, self.o = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        a = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        y = torch.bmm(v, a.transpose(1, 2))
        return x + self.o(y.unflatten(2, (6, 6)))


@pattern((2, 3, 6, 6), more=True, masked=False)
class OverChannels(nn.Module):  # XCA: the attention map is channels times channels
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.o = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        a = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return self.o(torch.bmm(a, v).unflatten(2, (6, 6)))


@pattern((2, 6), (2, 5), free={"a.weight": (4, 6 + 1 + 3 * 3), "b.weight": (3, 5 + 1 + 4 * 3)})
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(5, 3), nn.Bilinear(4, 3, 3)

    def forward(self, x, y):
        return self.c(self.a(x), self.b(y))
