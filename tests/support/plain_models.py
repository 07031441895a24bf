"""Backbones by their published formulas in plain torch, without transformers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Tensors = dict[str, torch.Tensor]
HIDDEN, HEADS, SIZE, LAYERS, VOCABULARY, INNER = 32, 4, 8, 4, 200, 48


@dataclass(frozen=True)
class Decoder:
    """Llama's, and what others change in it."""

    theta: float = 10000.0
    kv_heads: int = 2
    eps: float = 1e-5
    windows: Sequence[int | None] = (None,) * LAYERS
    slow_down: Callable[[torch.Tensor], torch.Tensor] = lambda frequencies: frequencies
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu
    biases: bool = False  # of queries, keys and values
    norms_of_heads: bool = False
    gemma: bool = False  # embeddings times sqrt(hidden size); norms' weights are around zero
    norms_after: bool = False  # of what attention and MLP add
    scale: float = SIZE**-0.5
    cap: float | None = None  # of attention's logits

    def tensors(self) -> Tensors:
        around = 0.0 if self.gemma else 1.0
        found = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": normal(HIDDEN) + around}
        sizes = {"q": HEADS * SIZE, "k": self.kv_heads * SIZE, "v": self.kv_heads * SIZE}
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            for name, rows in sizes.items():
                found[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, HIDDEN)
                if self.biases:
                    found[f"{at}.self_attn.{name}_proj.bias"] = normal(rows)
            found[f"{at}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * SIZE)
            found[f"{at}.mlp.gate_proj.weight"] = normal(INNER, HIDDEN)
            found[f"{at}.mlp.up_proj.weight"] = normal(INNER, HIDDEN)
            found[f"{at}.mlp.down_proj.weight"] = normal(HIDDEN, INNER)
            norms = ["input_layernorm", "post_attention_layernorm"]
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.norms_after else []
            found |= {f"{at}.{norm}.weight": normal(HIDDEN) + around for norm in norms}
            if self.norms_of_heads:
                found |= {f"{at}.self_attn.{name}_norm.weight": normal(SIZE) + around for name in "qk"}
        return found

    def states(self, ids: Sequence[int], t: Tensors) -> torch.Tensor:
        x = t["model.embed_tokens.weight"][list(ids)] * (HIDDEN**0.5 if self.gemma else 1)
        frequencies = self.slow_down(self.theta ** -(torch.arange(0, SIZE, 2) / SIZE))
        for i, window in enumerate(self.windows):
            at = f"model.layers.{i}"
            attended = self._attend(self._norm(x, t[f"{at}.input_layernorm.weight"]), t, at, frequencies, window)
            after = t[f"{at}.post_attention_layernorm.weight"]
            x = x + (self._norm(attended, after) if self.norms_after else attended)
            h = self._norm(x, t[f"{at}.pre_feedforward_layernorm.weight"] if self.norms_after else after)
            gate = self.activation(h @ t[f"{at}.mlp.gate_proj.weight"].T)
            h = (gate * (h @ t[f"{at}.mlp.up_proj.weight"].T)) @ t[f"{at}.mlp.down_proj.weight"].T
            x = x + (self._norm(h, t[f"{at}.post_feedforward_layernorm.weight"]) if self.norms_after else h)
        return self._norm(x, t["model.norm.weight"])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * (weight + 1 if self.gemma else weight)

    def _attend(
        self, h: torch.Tensor, t: Tensors, at: str, frequencies: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        q, k, v = (
            F.linear(h, t[f"{at}.self_attn.{name}_proj.weight"], t.get(f"{at}.self_attn.{name}_proj.bias"))
            .unflatten(-1, (-1, SIZE))
            .transpose(0, 1)
            for name in "qkv"
        )
        if self.norms_of_heads:
            q, k = (self._norm(x, t[f"{at}.self_attn.{name}_norm.weight"]) for name, x in (("q", q), ("k", k)))
        q, k = rotated(q, frequencies), rotated(k, frequencies)
        k, v = (x.repeat_interleave(HEADS // self.kv_heads, dim=0) for x in (k, v))
        logits = q @ k.transpose(-1, -2) * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        distance = torch.arange(len(h))[:, None] - torch.arange(len(h))
        seen = (distance >= 0) & (distance < (window or len(h)))
        out = logits.masked_fill(~seen, -math.inf).softmax(-1) @ v
        return out.transpose(0, 1).flatten(1) @ t[f"{at}.self_attn.o_proj.weight"].T


def normal(*shape: int, std: float = 0.25) -> torch.Tensor:
    return torch.randn(*shape) * std


def rotated(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """The first 2 * len(frequencies) features of [heads, positions, size]: pairs lie half of them apart."""
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    half = len(frequencies)
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), x[..., 2 * half :]]
    return torch.cat(turned, dim=-1)


def llama3(frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's: factor 8, 8192 tokens, wavelengths between a quarter and the whole of them in between."""
    turns = 8192 * frequencies / (2 * math.pi)
    share = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return frequencies * (share + (1 - share) / 8)


def neox_tensors() -> Tensors:
    found = {"gpt_neox.embed_in.weight": normal(VOCABULARY, HIDDEN)} | _norms("gpt_neox.final_layer_norm")
    for i in range(LAYERS):
        at = f"gpt_neox.layers.{i}"
        found |= _norms(f"{at}.input_layernorm") | _norms(f"{at}.post_attention_layernorm")
        found |= _linear(f"{at}.attention.query_key_value", 3 * HIDDEN, HIDDEN)
        found |= _linear(f"{at}.attention.dense", HIDDEN, HIDDEN)
        found |= _linear(f"{at}.mlp.dense_h_to_4h", INNER, HIDDEN) | _linear(f"{at}.mlp.dense_4h_to_h", HIDDEN, INNER)
    return found


def neox_states(ids: Sequence[int], t: Tensors) -> torch.Tensor:
    """Pythia's: attention and MLP side by side, a quarter of each head is rotated, a head's q, k and v lie together."""
    x = t["gpt_neox.embed_in.weight"][list(ids)]
    size, part = HIDDEN // HEADS, HIDDEN // HEADS // 4
    frequencies = 10000.0 ** -(torch.arange(0, part, 2) / part)
    causal = torch.ones(len(ids), len(ids)).tril().bool()
    for i in range(LAYERS):
        at = f"gpt_neox.layers.{i}"
        qkv = _apply(t, f"{at}.attention.query_key_value", _layer_norm(x, t, f"{at}.input_layernorm", 1e-5))
        q, k, v = qkv.view(len(ids), HEADS, 3, size).permute(2, 1, 0, 3)
        logits = rotated(q, frequencies) @ rotated(k, frequencies).transpose(-1, -2) / size**0.5
        out = (logits.masked_fill(~causal, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        h = F.gelu(_apply(t, f"{at}.mlp.dense_h_to_4h", _layer_norm(x, t, f"{at}.post_attention_layernorm", 1e-5)))
        x = x + _apply(t, f"{at}.attention.dense", out) + _apply(t, f"{at}.mlp.dense_4h_to_h", h)
    return _layer_norm(x, t, "gpt_neox.final_layer_norm", 1e-5)


BUCKETS, LONGEST = 8, 512


def deberta_tensors() -> Tensors:
    found = {"deberta.embeddings.word_embeddings.weight": normal(VOCABULARY, HIDDEN)}
    found |= _norms("deberta.embeddings.LayerNorm") | _norms("deberta.encoder.LayerNorm")
    found["deberta.encoder.rel_embeddings.weight"] = normal(2 * BUCKETS, HIDDEN)
    for i in range(LAYERS):
        at = f"deberta.encoder.layer.{i}"
        for name in ("query_proj", "key_proj", "value_proj"):
            found |= _linear(f"{at}.attention.self.{name}", HIDDEN, HIDDEN)
        found |= _linear(f"{at}.attention.output.dense", HIDDEN, HIDDEN) | _norms(f"{at}.attention.output.LayerNorm")
        found |= _linear(f"{at}.intermediate.dense", INNER, HIDDEN) | _linear(f"{at}.output.dense", HIDDEN, INNER)
        found |= _norms(f"{at}.output.LayerNorm")
    return found


def deberta_states(ids: Sequence[int], t: Tensors) -> torch.Tensor:
    """DeBERTa v3's: attention by content and by distance, in logarithmic buckets, projected alike."""
    eps = 1e-7
    x = _layer_norm(t["deberta.embeddings.word_embeddings.weight"][list(ids)], t, "deberta.embeddings.LayerNorm", eps)
    distances = _layer_norm(t["deberta.encoder.rel_embeddings.weight"], t, "deberta.encoder.LayerNorm", eps)
    rows = torch.tensor([[_bucket(i - j) for j in range(len(ids))] for i in range(len(ids))]) + BUCKETS
    rows = rows.clamp(0, 2 * BUCKETS - 1)

    def heads(at: str, h: torch.Tensor) -> torch.Tensor:
        return _apply(t, at, h).unflatten(-1, (HEADS, -1)).transpose(0, 1)

    for i in range(LAYERS):
        at = f"deberta.encoder.layer.{i}"
        q, k, v = (heads(f"{at}.attention.self.{name}_proj", x) for name in ("query", "key", "value"))
        q_far, k_far = (heads(f"{at}.attention.self.{name}_proj", distances) for name in ("query", "key"))
        logits = q @ k.transpose(-1, -2)
        logits = logits + (q[:, :, None] * k_far[:, rows]).sum(-1) + (k[:, None] * q_far[:, rows]).sum(-1)
        out = (logits / (3 * HIDDEN // HEADS) ** 0.5).softmax(-1) @ v
        out = _apply(t, f"{at}.attention.output.dense", out.transpose(0, 1).flatten(1))
        x = _layer_norm(x + out, t, f"{at}.attention.output.LayerNorm", eps)
        h = _apply(t, f"{at}.output.dense", F.gelu(_apply(t, f"{at}.intermediate.dense", x)))
        x = _layer_norm(x + h, t, f"{at}.output.LayerNorm", eps)
    return x


def _bucket(distance: int) -> int:
    middle = BUCKETS // 2
    if abs(distance) <= middle:
        return distance
    far = math.log(abs(distance) / middle) / math.log((LONGEST - 1) / middle) * (middle - 1)
    return int(math.copysign(math.ceil(far) + middle, distance))


def _linear(name: str, rows: int, columns: int) -> Tensors:
    return {f"{name}.weight": normal(rows, columns), f"{name}.bias": normal(rows)}


def _norms(name: str) -> Tensors:
    return {f"{name}.weight": normal(HIDDEN) + 1, f"{name}.bias": normal(HIDDEN)}


def _apply(t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def _layer_norm(x: torch.Tensor, t: Tensors, name: str, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (HIDDEN,), t[f"{name}.weight"], t[f"{name}.bias"], eps)
