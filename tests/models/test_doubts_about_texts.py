"""Where Hugging Face would read other tokens of the same texts, the server says so when it loads, and only there."""

from pathlib import Path

import pytest
import torch
from checkpoints import TEMPLATE, padded_scores, save_checkpoint
from rewardserve.engine.native.load import load_runner
from rewardserve.engine.native.options import NativeOptions
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TEXTS = ["What is 2 + 2?", "It is 4.", "some other words"]
PADDED = TEMPLATE.replace("<|im_end|>\\n", "<|pad|>")


def warnings_at_load(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    load_runner(NativeOptions(str(folder), path="padded", num_threads=1))
    return "\n".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_a_template_that_ends_in_padding_is_told_with_what_gives_hugging_faces_number(tmp_path, caplog) -> None:
    save_checkpoint(tmp_path, texts=TEXTS, template=PADDED)
    said = warnings_at_load(tmp_path, caplog)
    assert "ends in the padding token (pad_token_id 0)" in said
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    read_before, read_there = padded_scores(tmp_path, [ids[:-1], ids], torch.float32).tolist()
    assert theirs == pytest.approx(read_before, rel=1e-4) != pytest.approx(read_there, rel=1e-2)


def test_a_tokenizer_that_adds_a_token_which_verbatim_texts_lack_is_told(tmp_path, caplog) -> None:
    save_checkpoint(tmp_path, texts=TEXTS, template=None)
    assert warnings_at_load(tmp_path, caplog) == ""
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    assert "the tokenizer itself would add <|im_start|>" in warnings_at_load(tmp_path, caplog)
    spec_file, head = tmp_path / "rewardserve.toml", '[head]\nkind = "linear"\nweights = "score"\n'
    for read in (
        '[read]\nat = "mean"\n',
        '[read]\nat = "every"\npattern = [5]\n[steps]\nstyle = "tagged"\ntag = "x"\n',
    ):
        spec_file.write_text(head + read)
        assert "the tokenizer itself would add <|im_start|>" in warnings_at_load(tmp_path, caplog), read
    spec_file.write_text(head + '[steps]\nstyle = "apart"\ntag = "x"\n')  # which begins with a BOS by itself
    assert warnings_at_load(tmp_path, caplog) == ""


def test_nothing_is_said_of_a_template_that_ends_otherwise(tmp_path, caplog) -> None:
    save_checkpoint(tmp_path, texts=TEXTS)
    assert warnings_at_load(tmp_path, caplog) == ""
