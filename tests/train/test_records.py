import json

import pytest

from jpeft.train.records import Record, from_dicts, read_jsonl, split


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_reads_both_forms_and_says_where(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = read_jsonl(write(tmp_path, {"prompt": "p", "completion": "c"}, "", {"messages": chat}))
    assert [(r.prompt, r.completion, r.messages) for r in records] == [("p", "c", None), ("", "", tuple(chat))]
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "3"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{oops", "expected a JSON object, got '{oops'"),
        ("3", "expected a JSON object, got '3'"),
        ({"prompt": "p", "completions": "c"}, "'completions' looks like 'completion'"),
        ({"message": []}, "'message' looks like 'messages'"),
        ({"prompt": "p", "completion": 3}, "'completion' to be a string, got int"),
        ({"prompt": "p", "completion": ""}, "empty string"),
        ({"prompt": "p", "completion": "c", "task": "2"}, "'task' to be a whole number from 0 on, got '2'"),
        ({"messages": []}, "'messages' to be a list"),
        ({"messages": [{"role": "user"}]}, "message 0 to be an object with 'role' and 'content'"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 0 to be a string"),
        ({"messages": [{"role": "user", "content": "x"}]}, "expected an assistant message"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = write(tmp_path, {"prompt": "p", "completion": "c"}, line)
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert f"{path}:2: " in str(error.value) and said in str(error.value)


def test_bad_lines_are_reported_together_on_one_screen(tmp_path):
    with pytest.raises(ValueError) as error:
        read_jsonl(write(tmp_path, *["{"] * 30))
    assert len(str(error.value).splitlines()) == 9 and "22 more" in str(error.value)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "c"}\n')
    with pytest.raises(ValueError, match=":1: expected UTF-8"):
        read_jsonl(path)


def test_an_empty_or_missing_file(tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        read_jsonl(write(tmp_path, "", ""))
    with pytest.raises(FileNotFoundError, match=r"did you mean .*data.jsonl\?"):
        read_jsonl(tmp_path / "dat.jsonl")


def test_split_is_disjoint_and_follows_the_seed():
    records = from_dicts([{"prompt": str(i), "completion": "c"} for i in range(10)], "memory")
    train, held_out = split(records, 0.2, seed=1)
    assert len(held_out) == 2 and not set(train) & set(held_out) and set(train) | set(held_out) == set(records)
    assert split(records, 0.2, seed=1) == (train, held_out)
    assert split(records, 0.2, seed=2) != (train, held_out)
    with pytest.raises(ValueError, match="at least 2 records"):
        split([Record("memory:1")], 0.2, seed=0)
