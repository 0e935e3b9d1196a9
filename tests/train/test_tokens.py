import numpy as np
import pytest
from tiny_llama import write_tokenizer

from jpeft.train.records import Record
from jpeft.train.tokens import Text, encode_record, encode_records

CHAT = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no"},
)
WITH_TAG = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITHOUT_TAG = WITH_TAG.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def text_with(tmp_path, **options):
    write_tokenizer(tmp_path, **options)
    return Text(tmp_path)


def learned(text, example):
    return text.tokenizer.decode(example.ids[example.learned].tolist(), skip_special_tokens=False)


def test_only_the_completion_and_the_end_are_learned(tmp_path):
    text = text_with(tmp_path)
    example = encode_record(text, Record("f:1", prompt="2 + 2 =", completion=" 4"), 32)
    assert learned(text, example) == " 4<eos>" and example.ids[0] == 257 and not example.truncated
    assert example.ids[~example.learned].tolist() == text.encode_prompt("2 + 2 =")


def test_a_completion_without_prompt_or_start_token(tmp_path):
    text = text_with(tmp_path, bos=False)
    assert learned(text, encode_record(text, Record("f:1", completion="abc"), 32)) == "bc<eos>"


def test_a_long_completion_is_cut_and_counted(tmp_path):
    text = text_with(tmp_path)
    example = encode_record(text, Record("f:1", prompt="ab", completion="x" * 20), 10)
    assert len(example.ids) == 11 and example.truncated == 1 + 2 + 20 + 1 - 11


def test_long_prompts_are_named_by_line(tmp_path):
    text = text_with(tmp_path)
    records = [Record(f"f:{i}", prompt="x" * (5 * i), completion="y") for i in (1, 2, 3)]
    with pytest.raises(ValueError) as error:
        encode_records(text, records, 10)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("f:2: the prompt has 11 tokens") and lines[1].startswith("f:3: ")


@pytest.mark.parametrize("template", [WITH_TAG, WITHOUT_TAG])
def test_every_turn_of_the_assistant_is_learned(tmp_path, template):
    text = text_with(tmp_path, chat_template=template)
    example = encode_record(text, Record("f:1", messages=CHAT), 64)
    assert learned(text, example) == "yes<eos>no<eos>"
    whole = text.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
    assert whole == "[user]hi[assistant]yes<eos>[user]so?[assistant]no<eos>"


def test_the_end_of_turn_outside_the_block_is_learned_too(tmp_path):
    moved = WITH_TAG.replace("<eos>{% endgeneration %}", "{% endgeneration %}<eos>")
    text = text_with(tmp_path, chat_template=moved)
    assert learned(text, encode_record(text, Record("f:1", messages=CHAT), 64)) == "yes<eos>no<eos>"


def test_a_template_that_never_ends_a_turn_gets_an_end(tmp_path):
    text = text_with(tmp_path, chat_template=WITH_TAG.replace("<eos>", ""))
    assert learned(text, encode_record(text, Record("f:1", messages=CHAT), 64)) == "yesno<eos>"


def test_the_default_template(tmp_path):
    text = text_with(tmp_path)
    example = encode_record(text, Record("f:1", messages=CHAT), 200)
    assert learned(text, example) == "yes<eos>no<eos>" and example.ids[0] == 257
    assert text.chat.render(CHAT[:1], add_generation_prompt=True) == "<bos>### user\nhi\n### assistant\n"


def test_a_template_whose_spans_are_uncertain_is_refused(tmp_path):
    numbered = "{{ messages | length }}" + WITHOUT_TAG
    text = text_with(tmp_path, chat_template=numbered)
    with pytest.raises(ValueError, match=r"f:1: cannot tell .*put \{% generation %\}"):
        encode_record(text, Record("f:1", messages=CHAT), 64)


def test_what_a_template_refuses_is_named(tmp_path):
    text = text_with(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="f:7: the chat template refuses these messages: roles must alternate"):
        encode_record(text, Record("f:7", messages=CHAT), 64)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer at .*tokenizer\.json"):
        Text(tmp_path)
    with pytest.raises(ValueError, match="not valid Jinja"):
        text_with(tmp_path, chat_template="{% for %}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Text(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no end-of-text token"):
        Text(tmp_path)


def test_decode_leaves_out_special_tokens(tmp_path):
    text = text_with(tmp_path)
    assert text.decode(np.array(text.encode_prompt("é x") + [text.eos])) == "é x"
