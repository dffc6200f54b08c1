"""Arbitrary rows, from a file to batches: whatever they hold, a run goes on or ends with one clear error."""

import contextlib
import json

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastsae.data.chat import ChatDataset, load_chats  # noqa: E402
from fastsae.data.dedup import dedup_ngrams  # noqa: E402
from fastsae.data.sequencing import FastSequencer  # noqa: E402
from fastsae.errors import FastsaeError  # noqa: E402
from tests.data.test_chat_template import PARTS  # noqa: E402
from tests.data.test_sequencing import GEMMA, QWEN, make_tokenizer  # noqa: E402

FRAGILE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ m.id | tojson }}{% endif %}{{ m.role }}{{ m.content + 1 if "
)
FRAGILE += "m.content | length == 3 else m.content }}{{ 1 / (m.content | length - 2) }}{% endfor %}"
TEMPLATES = {"qwen": QWEN, "gemma": GEMMA, "parts": PARTS, "fragile": FRAGILE}
TOKENIZERS: dict = {}

# every code point: halves of surrogate pairs, NUL, special tokens in the text
words = ["<|im_end|>", "\ud83d", "\ude00", "\0", "{{ 1 / 0 }}", "\u2028", "\ufeff", "assistant"]
texts = st.text(max_size=12) | st.text(st.characters(codec=None), max_size=8) | st.sampled_from(words)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "Human", "gpt", "chatgpt", "developer", ""]) | anything
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": anything}), max_size=3
)
contents = texts | parts | anything
turns = st.fixed_dictionaries(
    {}, optional={"role": roles, "content": contents, "from": roles, "value": contents, "id": anything}
)
chats = st.lists(turns | anything, max_size=4)
columns = st.sampled_from(["messages", "conversations", "text"])
rows = st.dictionaries(columns, chats | chats.map(json.dumps) | anything, min_size=1, max_size=2) | chats | anything
plain = [
    {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(3)
]
datasets_of_rows = st.lists(rows, min_size=1, max_size=5).flatmap(
    lambda odd: st.permutations([*plain, *odd])
) | st.lists(rows, min_size=1, max_size=3)
lines = st.binary(max_size=40) | rows.map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass"))
lines |= st.integers(1, 3000).map(lambda depth: b'{"messages": ' + b"[" * depth)
lines |= rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def tokenizer_of(name):
    if name not in TOKENIZERS:
        TOKENIZERS[name] = make_tokenizer("gemma" if name == "gemma" else "qwen", template=TEMPLATES[name])
    return TOKENIZERS[name]


def run_through(dialogues, template):
    """What a run does with a dataset; returns the dialogues that reached a batch."""
    assert all(turn["content"].encode() and turn["role"].encode() for dialogue in dialogues for turn in dialogue)
    indices, _ = dedup_ngrams((dialogues[i] for i in range(len(dialogues))), 3)
    sequencer = FastSequencer(dialogues, indices, tokenizer_of(template), 40, 100, endless=False)
    served = [index for batch in sequencer for index in batch.dialogue_ids[:, 0].tolist()]
    assert len(served) + sequencer.dropped == len(indices)
    assert sequencer.drops.seen == len(indices)
    json.dumps(sequencer.state_dict())
    return served


def check_rows(data, template):
    with contextlib.suppress(FastsaeError):
        dialogues = ChatDataset(data, "rows")
        assert len(dialogues) + dialogues.dropped == len(data)
        run_through(dialogues, template)


def check_file(path, content, template):
    path.write_bytes(content)
    with contextlib.suppress(FastsaeError):
        run_through(load_chats(str(path)), template)


def fuzz(n):
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("n", [25, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_rows(template, n):
    fuzz(n)(given(datasets_of_rows)(lambda data: check_rows(data, template)))()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("n", [25, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_any_file(tmp_path, template, n, suffix):
    good = [json.dumps(row).encode() for row in plain]
    path = tmp_path / f"a.{suffix}"
    content = st.lists(lines, max_size=4).map(lambda odd: b"\n".join([*good, *odd, *good])) | st.binary(max_size=60)
    if suffix == "json":
        content |= st.lists(lines, max_size=3).map(lambda odd: b"[" + b", ".join([*good, *odd]) + b"]")
    fuzz(n)(given(content)(lambda data: check_file(path, data, template)))()


@pytest.mark.parametrize("n", [25, pytest.param(2500, marks=pytest.mark.slow)])
def test_json_and_arrow_agree_on_any_rows_of_strings(n):
    datasets = pytest.importorskip("datasets")
    text = st.none() | st.text(max_size=6) | st.sampled_from([" ", "\n\u2003", "\x1c", "a"])
    turn = st.fixed_dictionaries({"role": text | st.sampled_from(["user", "system", "Human", "tool"]), "content": text})
    some = st.lists(st.fixed_dictionaries({"messages": st.none() | st.lists(turn, max_size=3)}), min_size=1, max_size=6)

    def check(data):
        data = [*plain, *data]
        arrow, rows_of_json = ChatDataset(datasets.Dataset.from_list(data), "arrow"), ChatDataset(data, "rows")
        assert list(arrow) == list(rows_of_json)
        assert (arrow.drops, arrow.unknown_roles) == (rows_of_json.drops, rows_of_json.unknown_roles)

    fuzz(n)(given(some)(check))()
