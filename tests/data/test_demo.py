import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae.data import demo
from fastsae.data.demo import corpus
from fastsae.data.demo.dialogues import SeenWindows, entry_text, make_dialogues
from fastsae.data.demo.docstrings import clean, parse_docstring
from fastsae.data.demo.sources import Entry, read_sources

transformers = pytest.importorskip("transformers")

SOURCE = '''"""Tools for boxes.

A box holds :class:`~box.Item` objects and ``None``.
"""
raise SystemExit("this module must not be executed")

def mean(values, axis=None, *, keep: bool = False) -> float:
    """Compute the mean of the values. It is exact.

    Args:
        values (list of float): The numbers to average,
            in any order.
        axis: The axis to reduce.

    Returns:
        The mean as a float.

    Raises:
        TypeError: If a value is no number.

    Example::

        >>> mean([1, 2, 0, 3])
        1.5
    """

class Box:
    """A box.

    Parameters
    ----------
    size : int, optional
        How many items fit into it.

    Returns
    -------
    out : Box
        The box itself.
    """
    def __init__(self, size=3): ...
    def open(self, force=False):
        """Open the box."""
        if not force:
            raise ValueError(f"the box {self} is locked")
    @property
    def weight(self):
        """Weight in grams."""
    def close(self): ...
'''


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "stdlib"
    for folder in ("box", "box/tests", "site-packages"):
        (root / folder).mkdir(parents=True)
    (root / "box/__init__.py").write_text(SOURCE)
    (root / "box/tests/hidden.py").write_text('"""Hidden test."""\n')
    (root / "site-packages/other.py").write_text('"""Another package."""\n')
    (root / "broken.py").write_text('"""Broken."""\ndef (:\n')
    (root / "latin.py").write_bytes(b'"""\xff\xfe not utf-8"""\n')
    (root / "plain.py").write_text('"""Copied."""\n')
    (root / "zcopy.py").write_text('"""Copied."""\n')
    return root


@pytest.fixture
def small_corpus(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "source_roots", lambda: {"": sources})
    return tmp_path / "cache"


def test_sources_are_parsed_and_never_executed(sources):
    entries = {entry.full_name: entry for entry in read_sources(sources, "")}
    assert set(entries) == {"box", "box.mean", "box.Box", "box.Box.open", "box.Box.weight", "plain", "zcopy"}
    assert entries["box"].sentences == ["Tools for boxes.", "A box holds `box.Item` objects and `None`."]
    assert entries["box"].members == ["mean", "Box"]
    mean = entries["box.mean"]
    assert (mean.kind, mean.signature) == ("function", "(values, axis=None, *, keep: bool=False) -> float")
    assert mean.sentences == ["Compute the mean of the values.", "It is exact."]
    assert mean.arguments == [
        ["values", "list of float", "The numbers to average, in any order."],
        ["axis", "", "The axis to reduce."],
    ]
    assert (mean.returns, mean.errors) == ("The mean as a float.", [["TypeError", "If a value is no number."]])
    assert mean.examples == [">>> mean([1, 2, 0, 3])\n1.5"]
    box = entries["box.Box"]
    assert (box.kind, box.signature, box.members) == ("class", "(size=3)", ["open", "weight", "close"])
    assert box.arguments == [["size", "int, optional", "How many items fit into it."]]
    assert box.returns == "`out` (Box): The box itself."
    assert entries["box.Box.open"].raised == [["ValueError", "the box ... is locked"]]
    assert entries["box.Box.open"].signature == "(force=False)"
    assert entries["box.Box.weight"].kind == "property"


def test_docstrings_attached_to_c_functions(tmp_path):
    text = 'common = parse_kwargs("""\n    input (Tensor): the input.\n    out: the result.\n""")\n'
    text += 'add_docstr(torch.abs, r"""abs(input) -> Tensor\n\nAbsolute value.\n\nArgs:\n    {input}\n""".format(**common))\n'
    (tmp_path / "_docs.py").write_text(text)
    (entry,) = read_sources(tmp_path, "torch")
    assert (entry.full_name, entry.signature, entry.kind) == ("torch.abs", "(input)", "function")
    assert entry.sentences == ["Absolute value."]
    assert entry.arguments == [["input", "Tensor", "the input."]]


def test_markup_is_cleaned_and_sphinx_fields_are_read():
    assert clean(":func:`torch.abs`  and `text <http://x.y>`__ in ``code``::") == "`torch.abs` and text in `code`:"
    parsed = parse_docstring("Do it.\n\n:param int x: The number.\n:returns: Nothing.\n:raises KeyError: Sometimes.\n")
    assert parsed.sentences == ["Do it."]
    assert parsed.arguments == [("x", "", "The number.")]
    assert (parsed.returns, parsed.errors) == ("Nothing.", [("KeyError", "Sometimes.")])


def test_cache_is_written_read_and_rebuilt_when_corrupt(small_corpus, monkeypatch):
    entries = corpus.load_entries()
    assert [e.full_name for e in entries].count("plain") == 1
    assert "zcopy" not in [e.full_name for e in entries]  # the same docstring again
    (path,) = small_corpus.iterdir()
    assert all(version.replace("+", "_") in path.name for version in corpus.versions().values())
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_sources", lambda *_: pytest.fail("the cache was not used"))
        assert corpus.load_entries() == entries
    good = path.read_bytes()
    lines = gzip.decompress(good).splitlines(keepends=True)
    for bad in (
        b"",
        b"no gzip",
        good[: len(good) // 2],
        gzip.compress(b"".join(lines[:-1])),
        gzip.compress(b'{"a":1}\n'),
    ):
        path.write_bytes(bad)
        assert corpus.load_entries() == entries
        assert gzip.decompress(path.read_bytes()) == b"".join(lines)
    assert [p.name for p in small_corpus.iterdir()] == [path.name]  # nothing half-written is left


def test_cache_that_cannot_be_written_only_costs_time(small_corpus, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSAE_CACHE", str(tmp_path / "file" / "below"))
    assert len(corpus.load_entries()) == 6


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FASTSAE_CACHE", "/a")
    assert corpus.cache_dir() == Path("/a")
    monkeypatch.delenv("FASTSAE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert corpus.cache_dir() == Path("/b/fastsae")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert corpus.cache_dir() == Path("/c/.cache/fastsae")


def test_seen_windows_match_sets_of_tuples():
    rng = torch.Generator().manual_seed(0)
    seen, reference = SeenWindows(3), set()
    for _ in range(200):
        words = [
            str(int(w)) for w in torch.randint(0, 6, (int(torch.randint(1, 9, (1,), generator=rng)),), generator=rng)
        ]
        windows = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        expected = not windows & reference
        if expected:
            reference |= windows
        assert seen.add_if_new(" ".join(words)) == expected


def test_dialogues_of_one_entry_use_its_documentation(sources):
    dialogues = make_dialogues([e for e in read_sources(sources, "") if e.full_name == "box.mean"])
    text = "\n".join(m["content"] for d in dialogues for m in d)
    for part in (
        "Compute the mean of the values. It is exact.",
        "the mean as a float",
        "`TypeError`",
        ">>> mean([1, 2, 0, 3])",
    ):
        assert text.count(part) == 1 or text.lower().count(part.lower()) == 1


def test_plain_text_of_an_entry():
    entry = Entry("m", "f", "function", "(x)", ["Do it"], [["x", "int", "A number."]], "y", [["E", "never"]])
    assert (
        entry_text(entry)
        == "m.f(x)\n\nDo it.\n\nArguments:\n  x (int): A number.\n\nReturns:\n  y\n\nRaises:\n  E: never"
    )


def test_all_dialogues_are_many_well_formed_and_survive_deduplication():
    dialogues = demo.load_dialogues()
    assert len(dialogues) >= 20_000
    for dialogue in dialogues:
        roles = [message["role"] for message in dialogue]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 4
        assert all(message["content"].strip() for message in dialogue)
    with_system = sum(d[0]["role"] == "system" for d in dialogues)
    assert 0.1 < with_system / len(dialogues) < 0.3
    kept, seen = 0, set()
    sample = dialogues[:4000]
    for dialogue in sample:
        turns = [message["content"].split() for message in dialogue]
        windows = {tuple(t[i : i + 20]) for t in turns for i in range(len(t) - 19)}
        if not windows & seen:
            kept += 1
            seen |= windows
    assert kept >= 0.9 * len(sample)


def test_limit_takes_the_first_and_gives_fresh_messages():
    first = demo.load_dialogues(3)
    first[0][0]["content"] = "changed"
    assert len(first) == 3
    assert demo.load_dialogues(3)[0][0]["content"] != "changed"
    assert first[1:] == demo.load_dialogues()[1:3]


def test_dialogues_are_the_same_in_another_process(small_corpus):
    entries = corpus.load_entries()
    (path,) = small_corpus.iterdir()
    code = f"""
import json, gzip
from fastsae.data.demo.dialogues import make_dialogues
from fastsae.data.demo.sources import Entry
lines = gzip.open({str(path)!r}, "rt").read().splitlines()[:-1]
print(json.dumps(make_dialogues([Entry(**json.loads(line)) for line in lines])))
"""
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == make_dialogues(entries)


def test_plain_text_is_a_stream_of_documents():
    texts = demo.plain_text()
    first = [next(texts) for _ in range(50)]
    assert all(len(text) > 10 for text in first)
    assert len(set(first)) == 50


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.model_path())


def test_chat_template_round_trip(tokenizer):
    chat = [{"role": "user", "content": "What does é do?"}, {"role": "assistant", "content": "  It\nreturns 12."}]
    expected = "<|im_start|>user\nWhat does é do?<|im_end|>\n<|im_start|>assistant\n  It\nreturns 12.<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == expected
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end), tokenizer.eos_token_id) == (2, 2, end)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat does é do?<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) <= 4096


def test_missing_model_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(demo, "__file__", "/nowhere/__init__.py")
    with pytest.raises(demo.FastsaeError, match=r"missing.*tools\.demo_model"):
        demo.model_path()
