"""An encoder is shown prompt and response as its own tokenizer pairs them, and scores as Hugging Face does."""

from pathlib import Path

import pytest
import torch
from rewardserve.errors import InvalidRequest
from rewardserve.models.text_export import export_text
from rewardserve.text.encoder import Encoder
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.types import Conversation, Message, PlainText, PromptGroup, ScoreRequest
from scoring import native
from texts import all_texts, groups
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, DebertaV2Config, PreTrainedTokenizerFast

PAIRS = [("What is 2 + 2?", "It is 4."), ("Write code.", "x = 1\n  y = é"), ("q", "two  spaces")]


def tokenizer_of(pre_tokenizer) -> PreTrainedTokenizerFast:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.Metaspace()
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    texts = [*all_texts(groups(6, 6)), *(text for pair in PAIRS for text in pair)]
    backend.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=390, special_tokens=specials, unk_token="[UNK]", show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path)


def save_encoder(folder: Path, **options) -> Path:
    config = DebertaV2Config(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        **{"type_vocab_size": 0, **options},
    )
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer_of(pre_tokenizers.Metaspace(prepend_scheme="always")).save_pretrained(folder)
    return folder


async def test_texts_score_as_hugging_face_scores_the_pair(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    async with native(folder) as scorer:
        info = scorer.info
        assert info.text is not None, info.text_missing_reason
        encoder = Encoder(Tokenizer(info.text), info.vocab_size, info.max_length)
        for question, answer in PAIRS:
            request = ScoreRequest("", "", (PromptGroup("", PlainText(question), (answer,)),))
            (group,) = encoder.encode(request).groups
            ids = [*torch.frombuffer(bytearray(group.prompt + group.responses[0]), dtype=torch.int32).tolist()]
            assert ids == tokenizer(question, answer)["input_ids"]
            with torch.inference_mode():
                wanted = model(**tokenizer(question, answer, return_tensors="pt")).logits[0, 0].item()
            got = (await scorer.run([(ids[:-2], [ids[-2:]])])).groups[0].items[0].score
            assert got == pytest.approx(wanted, abs=1e-5)
        for before in (("user", "assistant"), ("system",)):  # whose texts would be glued to the question
            asked = Conversation(tuple(Message(role, "Hi") for role in (*before, "user")))
            with pytest.raises(InvalidRequest, match="one question, and nothing before it"):
                encoder.encode(ScoreRequest("", "", (PromptGroup("", asked, ("Hello",)),)))


def test_pairs_that_are_no_single_text_are_scored_by_ids_only(tmp_path: Path) -> None:
    """Where only the first segment is given a leading space, the second half of a text is not what it is in a pair."""
    tokenizer_of(pre_tokenizers.Metaspace(prepend_scheme="first")).save_pretrained(tmp_path)
    text, reason = export_text(tmp_path, in_pairs=True)
    assert text is None and "pairs cannot be written as one text" in reason


async def test_an_encoder_that_tells_segments_by_token_types_is_scored_by_ids_only(tmp_path: Path) -> None:
    save_encoder(tmp_path, type_vocab_size=2)
    async with native(tmp_path) as scorer:
        assert scorer.info.text is None and "type_vocab_size is 2" in scorer.info.text_missing_reason


async def test_the_poolers_activation_is_the_configs(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path, pooler_hidden_act="tanh")).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([[1, 5, 6, 7, 2]])).logits[0, 0].item()
    async with native(tmp_path) as scorer:
        assert (await scorer.scores([([1, 5, 6], [[7, 2]])])).item() == pytest.approx(wanted, abs=1e-5)
