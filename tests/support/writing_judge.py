"""A language model of transformers' own class that writes what it is told to: each token has one that follows it.

Attention and MLPs add nothing, so the last token's embedding is what the head reads, and the head's row of a token is
the sum of the embeddings of those it follows.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from checkpoints import make_tokenizer
from tokenizers import AddedToken
from transformers import Qwen2Config, Qwen2ForCausalLM

END = "<|im_end|>"


def save_writing_judge(folder: Path, said: Mapping[str, Sequence[str]], told: str, max_length: int = 256) -> None:
    """`said`: what it writes after a question that ends in a word. Every piece is a token; no piece is said after two
    words. One that is said twice goes on forever. `told` is its rewardserve.toml.
    """
    tokenizer = make_tokenizer(["Q: what is it? A: it is this, or that."], template=None)
    pieces = dict.fromkeys([*said, *(piece for answer in said.values() for piece in answer)])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces if piece != END])
    tokenizer.eos_token = END
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    embeddings = model.model.embed_tokens.weight.data.normal_()
    model.lm_head.weight.data.zero_()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    for word, answer in said.items():
        ids = tokenizer.convert_tokens_to_ids([word, *answer])
        for before, after in itertools.pairwise(ids):
            model.lm_head.weight.data[after] += embeddings[before]
    model.save_pretrained(folder)
    (folder / "rewardserve.toml").write_text(told)
