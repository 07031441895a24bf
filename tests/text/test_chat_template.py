"""The front renders as transformers does, or the model is not served."""

import dataclasses
import json
from datetime import datetime, timedelta
from pathlib import Path

import jinja2
import pytest
from checkpoints import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from rewardserve.errors import InvalidRequest, LoadFailed
from rewardserve.models.text_export import export_text
from rewardserve.text import chat_template
from rewardserve.text.chat_template import ChatTemplate
from rewardserve.text.tokenizer import Tokenizer
from rewardserve.types import Conversation, Message, PlainText, Probe

examples = settings(max_examples=60)

CONVERSATION = (("user", "Hi <b>\n"), ("assistant", " 'ok' \" é "), ("user", "{{ 1 }}"))


def render(source: str, **special: str) -> str:
    return ChatTemplate(source, special).render([Message(*turn) for turn in CONVERSATION], True)


FRAGMENTS = (
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages[1].content | tojson(ensure_ascii=true) }}",
    "{% for m in messages %}\n    {% if loop.first %}\n  x\n    {% endif %}\n{% endfor %}\n",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{%- generation -%} x {%- endgeneration -%}",
    "{{ messages[9] is undefined }}{{ nothing }}{{ tools is none }}{{ documents is none }}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "{{ messages[-1]['content'].strip() | upper }}{{ messages[0]['content'][::-1] }}",
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}{% endfor %}{{ ns.found }}",
    "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{{ turn(messages[0]) }}",
    "{{ add_generation_prompt }}{{ messages | length }}{{ messages | map(attribute='role') | join(',') }}",
    "{{ strftime_now('%Y') }}",
)


@pytest.mark.parametrize("source", FRAGMENTS)
def test_every_construct_renders_as_in_transformers(make_text, source: str) -> None:
    text = make_text(source)
    assert render(source, **text.spec.special_tokens) == text.chat(CONVERSATION, True)


@pytest.mark.parametrize("arguments", ["sort_keys=true", "separators=(',', ':')"])
def test_tojson_takes_what_transformers_own_takes(make_text, arguments: str) -> None:
    source = "{{ {'b': messages[0].content, 'a': 1} | tojson(" + arguments + ") }}"
    dicts = [{"role": role, "content": content} for role, content in CONVERSATION]
    assert render(source) == make_text(None).hf.apply_chat_template(dicts, chat_template=source, tokenize=False)


def test_what_is_set_inside_of_generation_stays_there(make_text) -> None:
    source = "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{% endgeneration %}{{ x }}"
    dicts = [{"role": role, "content": content} for role, content in CONVERSATION]
    assert render(source) == make_text(None).hf.apply_chat_template(dicts, chat_template=source, tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_reach_out_or_change_the_messages(source: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        render("{{ (" + source.strip("{} ") + ") ~ '' }}")


def test_a_conversation_the_template_refuses_is_the_callers_error_with_the_templates_words(styles, tools) -> None:
    prompt = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    with pytest.raises(InvalidRequest, match="System role not supported") as refused:
        styles["gemma"].encoder().encode(tools.request((PlainText("fine"), ["x"]), (prompt, ["x"])))
    assert refused.value.field.startswith("groups[1].prompt")
    with pytest.raises(InvalidRequest, match="must alternate"):
        turns = Conversation((Message("user", "a"), Message("user", "b")))
        styles["gemma"].encoder().encode(tools.request((turns, ["x"])))


def test_a_template_that_fails_in_python_on_a_conversation_is_the_callers_error_too(make_text, tools) -> None:
    text = make_text("{% for m in messages %}{{ m.content if m.role != 'tool' else m.content + 1 }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="refuses"):
        text.encoder().encode(tools.request((Conversation((Message("tool", "x"),)), ["y"])))


FAILING = {
    "an attribute that a filter looks for": "'x' | dictsort",
    "a macro that calls itself": "f()",
    "more than there is memory": "'x' * 10 ** 15",
    "half a character": "'\\ud83d'",
}


@pytest.mark.parametrize("expression", FAILING.values(), ids=FAILING)
@pytest.mark.parametrize("condition", ["m.role == 'tool'", "true"])
def test_whatever_a_template_fails_in_is_told_to_its_caller(make_text, tools, expression: str, condition: str) -> None:
    macro = "{% macro f() %}{{ f() }}{% endmacro %}"
    text = make_text(
        f"{macro}{{% for m in messages %}}{{{{ {expression} if {condition} else m.content }}}}{{% endfor %}}"
    )
    with pytest.raises(InvalidRequest, match=r"refuses it: .+"):
        text.encoder().encode(tools.request((Conversation((Message("tool", "x"),)), ["y"])))


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ messages | nope }}", "{% for m in messages %}" * 30 + "{% endfor %}" * 30]
)
def test_a_template_that_is_none_is_told_at_load(make_text, source: str) -> None:
    with pytest.raises(LoadFailed, match="chat template is none: "):
        make_text(source).encoder()


def test_where_a_template_is_none_its_line_is_told() -> None:
    with pytest.raises(LoadFailed, match=r"none: line 3: Encountered unknown tag 'elif'"):
        ChatTemplate("{{ bos_token }}\n\n{% elif x %}\n{{ messages }}\n", {})
    with pytest.raises(LoadFailed, match=r"blocks$"):  # without the line of what jinja made of it
        ChatTemplate("{% for m in messages %}" * 30 + "{% endfor %}" * 30, {})


def test_the_probes_cover_prompts_and_whole_conversations(styles) -> None:
    for name, text in styles.items():
        assert {probe.add_generation_prompt for probe in text.spec.probes} == {True, False}, name


def test_probes_that_a_template_refuses_are_left_out(styles) -> None:
    assert 0 < len(styles["gemma"].spec.probes) < len(styles["chatml"].spec.probes)


def test_a_rendering_that_is_not_reproduced_refuses_the_model(styles) -> None:
    spec = styles["chatml"].spec
    other = dataclasses.replace(spec, chat_template=spec.chat_template.replace("<|im_start|>", "<|im_end|>"))
    with pytest.raises(LoadFailed, match="cannot be reproduced"):
        Tokenizer(other)
    with pytest.raises(LoadFailed, match="cannot be reproduced"):
        Tokenizer(dataclasses.replace(spec, chat_template="{{ raise_exception('no') }}"))


def test_other_token_ids_for_the_same_text_refuse_the_model(styles) -> None:
    spec = styles["chatml"].spec
    first, *others = spec.probes
    for ids in ((*first.token_ids, 1), first.token_ids[:-1], ()):
        with pytest.raises(LoadFailed, match="cannot be reproduced"):
            Tokenizer(dataclasses.replace(spec, probes=(dataclasses.replace(first, token_ids=ids), *others)))


def test_without_a_template_the_tokenizer_itself_is_probed(plain) -> None:
    assert plain.spec.chat_template is None and plain.tokenizer.template is None
    assert plain.spec.probes and all(probe.messages == () for probe in plain.spec.probes)
    wrong = Probe((), False, "x", (1, 2, 3))
    with pytest.raises(LoadFailed):
        Tokenizer(dataclasses.replace(plain.spec, probes=(wrong,)))


def test_a_dated_template_loaded_around_midnight_is_served(styles, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(chat_template, "datetime", Tomorrow)
    assert Tokenizer(styles["dated"].spec).template is not None


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(plain) -> None:
    saved = json.loads(plain.spec.tokenizer_json)
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    tokenizer = Tokenizer(dataclasses.replace(plain.spec, tokenizer_json=json.dumps(saved)))
    assert tokenizer.encode(["the answer is 42"])[0].tolist() == plain.ids("the answer is 42")


@examples
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_contents_are_never_templates(styles, content: str) -> None:
    for content_ in (content, "{{ bos_token }}" + content, "{% if %}"):
        assert content_ in styles["chatml"].tokenizer.template.render([Message("user", content_)], True)


def test_a_folder_without_tokenizer_files_has_no_text_and_says_why(tmp_path: Path) -> None:
    text, reason = export_text(tmp_path)
    assert text is None and "tokenizer.json" in reason


def test_a_broken_tokenizer_file_is_not_fatal_and_says_why(make_text, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    text, reason = export_text(tmp_path)
    assert text is None and "tokenizer" in reason
    make_text(None).hf.save_pretrained(tmp_path)
    assert export_text(tmp_path)[0] is not None
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "long"}))
    text, reason = export_text(tmp_path)
    assert text is None and "TypeError: '>' not supported" in reason


def test_several_templates_without_a_default_are_not_taken_for_none(make_text, tmp_path: Path) -> None:
    hf = make_text(None).hf
    hf.chat_template = {"a": "{{ messages }}", "b": "{{ messages }}"}
    hf.save_pretrained(tmp_path)
    text, reason = export_text(tmp_path)
    assert text is None or text.chat_template is not None or "template" in reason


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_takes_lists_of_parts_is_given_them(make_text, tools) -> None:
    """Those of models that see images. A string it would go through letter by letter, and render none."""
    text = make_text(PARTS)
    assert text.spec.probes and not make_text(TEMPLATE).spec.in_parts
    encoded = text.encoder().encode(tools.request((PlainText("Hi"), ["un happy"])))
    assert tools.whole_ids(encoded, 0, 0) == text.ids("<user>Hi<assistant>un happy")


def test_the_template_that_transformers_4_kept_beside_a_processor_is_the_checkpoints(make_text, tmp_path) -> None:
    make_text(None).hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    spec, reason = export_text(tmp_path)
    assert spec is not None and spec.chat_template == TEMPLATE, reason
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")  # what a tokenizer's class reads
    spec, reason = export_text(tmp_path)
    assert spec is not None and spec.chat_template == "{{ messages[0].content }}", reason
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{}")
    assert export_text(tmp_path) == (None, "no usable tokenizer: chat_template.json holds no chat_template")
