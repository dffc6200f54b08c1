"""Sequencing: the template's tokens exactly, every dialogue alone and once per epoch, exact resume."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastsae.data import sequencing, tokens
from fastsae.data.buffer import MixingBuffer
from fastsae.data.chat import ChatDataset
from fastsae.data.dropped import Dropped
from fastsae.data.sequencing import FastSequencer
from fastsae.data.stream import ActivationStream
from fastsae.data.tokens import render
from fastsae.errors import FastsaeError, UsageError

QWEN = """{%- if messages[0]['role'] == 'system' %}{{ '<|im_start|>system
' + messages[0]['content'] + '<|im_end|>
' }}{%- else %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{%- endif %}{%- for message in messages %}{%- if message.role != 'system' %}{{ '<|im_start|>' + message.role + '
' + message.content + '<|im_end|>
' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{%- endif %}"""
LLAMA = """{{ bos_token }}{%- for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>

' + message.content | trim + '<|eot_id|>' }}{%- endfor %}"""
GEMMA = """{{ bos_token }}{%- for message in messages %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{
raise_exception('Conversation roles must alternate') }}{%- endif %}{{ '<start_of_turn>' +
('model' if message.role == 'assistant' else message.role) + '
' + message.content + '<end_of_turn>
' }}{%- endfor %}"""
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
TEXT = ["user assistant system model You are a helpful assistant. one two three four five six seven eight nine ten"] * 9


def make_tokenizer(family: str, template: str | None = None, **special) -> PreTrainedTokenizerFast:
    tokens = SPECIAL[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False)
    words = " ".join(TEXT).split()
    backend.train_from_iterator([*TEXT, *(word for word in words for _ in range(9))], trainer)
    if family != "qwen":
        special = {"bos_token": tokens[0], **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[-1], pad_token=tokens[0], **special)
    tokenizer.chat_template = template or {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA}[family]
    return tokenizer


@pytest.fixture(scope="module")
def qwen():
    return make_tokenizer("qwen")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(sequencing, "WINDOW", 256)


def chat(*texts):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def corpus(n):
    words = TEXT[0].split()
    return [chat("number " + " ".join(words[i % 7 : i % 7 + 3]), " ".join(words[: i % 13]) + f" {i}") for i in range(n)]


def reference(tokenizer, dialogue):
    return tokenizer.apply_chat_template(dialogue, tokenize=True, add_generation_prompt=False, return_dict=False)


@pytest.mark.parametrize("family", ["qwen", "llama", "gemma"])
def test_render_is_the_template_tokenised(family):
    tokenizer = make_tokenizer(family)
    for dialogue in [*corpus(5), chat("a " * 300), chat("<|im_end|> π \n", " two")]:
        expected = reference(tokenizer, dialogue)
        assert render(tokenizer, dialogue) == expected
        assert render(tokenizer, dialogue, max_length=7) == expected[:7]


def test_bos_is_not_doubled():
    tokenizer = make_tokenizer("llama", template="{{ bos_token }}" + LLAMA)
    assert reference(tokenizer, corpus(1)[0])[:2] == [0, 0]
    assert render(tokenizer, corpus(1)[0]) == reference(tokenizer, corpus(1)[0])[1:]


def test_no_template_and_refused_dialogue():
    tokenizer = make_tokenizer("gemma")
    with pytest.raises(FastsaeError, match=r"roles assistant: .*must alternate") as caught:
        render(tokenizer, [{"role": "assistant", "content": "x"}])
    assert not isinstance(caught.value, UsageError)
    tokenizer.chat_template = None
    for use in (lambda: render(tokenizer, chat("x")), lambda: FastSequencer([chat("x")], [0], tokenizer)):
        with pytest.raises(UsageError, match=r"has no chat template\. Choose an instruction-tuned model"):
            use()


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_serves_each_dialogue_alone_and_once(qwen, shuffle):
    dialogues = corpus(700)
    indices = range(100, 700)
    served = []
    for batch in FastSequencer(
        dialogues, indices, qwen, max_length=40, batch_tokens=300, seed=3, shuffle=shuffle, endless=False
    ):
        assert batch.input_ids.numel() <= 300
        assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.bool)
        for ids, mask, index in zip(
            batch.input_ids, batch.attention_mask, batch.dialogue_ids[:, 0].tolist(), strict=True
        ):
            length = int(mask.sum())
            assert mask[:length].all()  # padded on the right
            assert ids[:length].tolist() == reference(qwen, dialogues[index])[:40]
            assert (ids[length:] == qwen.pad_token_id).all()
            served.append(index)
    assert sorted(served) == list(indices)
    blocks = [served[:256], served[256:512], served[512:]]
    in_order = [set(range(100, 356)), set(range(356, 612)), set(range(612, 700))]
    assert ([set(block) for block in blocks] == in_order) is not shuffle


def test_order_depends_on_seed_and_epoch(qwen):
    dialogues = corpus(60)

    def epochs(seed):
        sequencer = FastSequencer(dialogues, range(60), qwen, batch_tokens=200, seed=seed)
        order = {0: [], 1: []}
        for batch in sequencer:
            if sequencer.epoch == 2:
                return order
            order[sequencer.epoch] += batch.dialogue_ids[:, 0].tolist()

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    assert sorted(first[0]) == sorted(first[1]) == list(range(60))
    assert len({tuple(order) for order in (first[0], first[1], other[0], other[1])}) == 4


def test_a_long_dialogue_is_a_batch_by_itself(qwen):
    dialogues = [chat("one"), chat("two " * 200), chat("three")]
    sizes = [b.input_ids.shape for b in FastSequencer(dialogues, range(3), qwen, batch_tokens=100, endless=False)]
    assert sorted(rows for rows, _ in sizes) == [1, 2]


def equal(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "attention_mask", "dialogue_ids", "positions")
    )


def test_resume_goes_on_with_the_next_batch_from_every_position():
    tokenizer = make_tokenizer("gemma")
    dialogues = corpus(600)
    for i in (5, 300, 301):
        dialogues[i] = [{"role": "assistant", "content": "refused"}]

    def make():
        return FastSequencer(dialogues, range(600), tokenizer, batch_tokens=4000, seed=1)

    sequencer = make()
    states, batches, dropped = [sequencer.state_dict()], [], []
    for _ in range(25):
        batches.append(next(sequencer))
        states.append(sequencer.state_dict())
        dropped.append(sequencer.dropped)
    assert sequencer.epoch >= 1
    assert max(dropped) == 3
    assert all(json.loads(json.dumps(state)) == state for state in states)
    for position, state in enumerate(states[:-1]):
        resumed = make()
        resumed.load_state_dict(state)
        assert equal(next(resumed), batches[position])
        assert resumed.dropped == dropped[position]
    other = FastSequencer(dialogues, range(500), tokenizer, seed=1)
    with pytest.raises(UsageError, match="n_dialogues = 600, this run has 500"):
        other.load_state_dict(states[3])


def test_stream_and_buffer_resume_together(qwen):
    dialogues = corpus(300)
    table = torch.nn.Embedding(600, 4).weight.detach()

    def start(sequencer_state=None, buffer_state=None):
        sequencer = FastSequencer(dialogues, range(300), qwen, batch_tokens=150, seed=2)
        stream = ActivationStream(lambda ids, mask: table[ids], sequencer)
        buffer = MixingBuffer(stream, capacity=500, batch_size=64, seed=3)
        if sequencer_state is not None:
            sequencer.load_state_dict(sequencer_state)
            buffer.load_state_dict(buffer_state)
        return sequencer, buffer

    sequencer, buffer = start()
    for _ in range(9):
        next(buffer)
    saved = sequencer.state_dict(), buffer.state_dict()
    _, resumed = start(*saved)
    for _ in range(150):
        ours, theirs = next(resumed).tensors(), next(buffer).tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sequencer.state_dict()["window"] > saved[0]["window"] or sequencer.epoch > saved[0]["epoch"]


def test_nothing_left_to_serve(qwen):
    with pytest.raises(UsageError, match="no dialogues"):
        FastSequencer(corpus(3), [], qwen)
    refused = [[{"role": "assistant", "content": "x"}]] * 4
    sequencer = FastSequencer(refused, range(4), make_tokenizer("gemma"))
    with pytest.raises(FastsaeError, match=r"all 4 dialogues were dropped: .* 4 because the chat temp.*must alternate"):
        next(sequencer)
    short = make_tokenizer("qwen", template="{{ messages[0]['content'] }}")
    sequencer = FastSequencer([chat("a"), chat("a b c")], range(2), short, endless=False)
    assert [batch.dialogue_ids[:, 0].tolist() for batch in sequencer] == [[1]]
    assert sequencer.dropped == 1


FAILS_ON_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ m.id | tojson }}{% endif %}{{ m.content }}{% endfor %}"
)


def test_dropped_dialogues_count_once_in_a_run_whatever_the_reason(caplog):
    tokenizer = make_tokenizer("qwen", template=FAILS_ON_TOOLS)
    dialogues = corpus(600)
    for i in (5, 300, 301):
        dialogues[i] = [{"role": "tool", "content": "42"}]
    dialogues[7] = chat("a")
    sequencer = FastSequencer(dialogues, range(600), tokenizer, batch_tokens=4000, shuffle=False)
    seen = set()
    with caplog.at_level("WARNING", "fastsae"):
        while sequencer.epoch < 2:
            next(sequencer)
            seen.add(sequencer.dropped)
    tools = "the chat template raised an error (TypeError)"
    assert sequencer.drops == Dropped(
        600, {tools: 3, "it has fewer than 2 tokens": 1}, {tools: 5, "it has fewer than 2 tokens": 7}
    )
    assert seen == {2, 4}  # after the first window of 256, and after the second
    assert caplog.text == ""  # 4 of 600


def test_more_than_one_percent_dropped_is_one_warning_with_the_row_in_the_dataset(caplog):
    rows = [{"messages": dialogue} for dialogue in [[], *corpus(600)]]
    for i in range(0, 601, 30):
        rows[i] = {"messages": [{"role": "user", "content": "secret"}, {"role": "tool", "content": "secret"}]}
    rows[0] = {"messages": []}  # so that a dialogue's index is not its row
    dialogues = ChatDataset(rows, "rows")
    tokenizer = make_tokenizer("qwen", template=FAILS_ON_TOOLS)
    with caplog.at_level("WARNING", "fastsae"):
        for _ in FastSequencer(dialogues, range(600), tokenizer, shuffle=False, endless=False):
            pass
    (record,) = caplog.records
    assert record.getMessage() == (
        "8 of 256 dialogues cannot be used: 8 because the chat template raised an error (TypeError) (such as row 30)"
    )


def test_counts_survive_a_checkpoint_in_a_later_epoch():
    tokenizer = make_tokenizer("qwen", template=FAILS_ON_TOOLS)
    dialogues = [*corpus(300), [{"role": "tool", "content": "42"}]]

    def make():
        return FastSequencer(dialogues, range(301), tokenizer, seed=4)

    sequencer = make()
    while sequencer.epoch < 1:
        next(sequencer)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(sequencer.state_dict())))
    for both in (sequencer, resumed):
        for _ in range(12):
            next(both)
    assert resumed.drops == sequencer.drops
    assert (sequencer.dropped, sequencer.drops.seen) == (1, 301)


@pytest.mark.parametrize(
    "change",
    [{"epoch": -1}, {"window": 9}, {"batch": 10**9}, {"batch": "0"}, {"window": 0.0}, {"dropped": 3}, {"epoch": True}],
)
def test_a_state_that_no_sequencer_writes_is_refused(qwen, change):
    sequencer = FastSequencer(corpus(300), range(300), qwen)
    next(sequencer)
    with pytest.raises(ValueError, match=r"expected|there is no batch"):
        sequencer.load_state_dict({**sequencer.state_dict(), **change})


def test_the_end_of_a_pass_can_be_resumed(qwen):
    sequencer = FastSequencer(corpus(3), range(3), qwen, endless=False)
    list(sequencer)
    resumed = FastSequencer(corpus(3), range(3), qwen, endless=False)
    resumed.load_state_dict(sequencer.state_dict())
    assert list(resumed) == []


def test_a_text_on_which_the_tokenizer_fails_is_dropped_alone(qwen, monkeypatch):
    def refuse(tokenizer, texts, max_length):
        if any("secret" in text for text in texts):
            raise TypeError("no such text: secret")
        return tokenize(tokenizer, texts, max_length)

    tokenize = tokens.tokenize
    monkeypatch.setattr(tokens, "tokenize", refuse)
    dialogues = [*corpus(5), chat("secret"), *corpus(5)]
    sequencer = FastSequencer(dialogues, range(11), qwen, endless=False)
    served = [index for batch in sequencer for index in batch.dialogue_ids[:, 0].tolist()]
    assert sorted(served) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    reason = "the tokenizer raised an error (TypeError)"
    assert sequencer.drops == Dropped(11, {reason: 1}, {reason: 5})


def test_lone_surrogates_reach_no_tokenizer(qwen):
    assert render(qwen, chat("a \ud83d")) == render(qwen, chat("a \ufffd"))


@pytest.mark.parametrize("max_length", [2, 50, 700])
def test_a_very_long_text_is_read_no_further_than_needed(qwen, max_length, monkeypatch):
    monkeypatch.setattr(tokens, "_UNSURE", 16)
    read = []
    call = type(qwen).__call__
    monkeypatch.setattr(
        type(qwen),
        "__call__",
        lambda self, texts, **options: read.append(len(texts[0])) or call(self, texts, **options),
    )
    dialogue = chat("nine ten one " * 20_000)
    expected = reference(qwen, dialogue)
    read.clear()
    assert render(qwen, dialogue, max_length) == expected[:max_length]
    assert sum(read) == 16 * (max_length + 16)


def test_a_long_text_of_few_tokens_is_read_as_far_as_needed(monkeypatch):
    monkeypatch.setattr(tokens, "_UNSURE", 120)
    tokenizer = make_tokenizer("qwen", template="{{ messages[0].content }}")
    tokenizer.add_tokens(["x" * 100])
    text = "x" * 100 * 50 + "one two"
    assert render(tokenizer, chat(text), 20) == reference(tokenizer, chat(text))[:20]
    assert render(tokenizer, chat(text), 500) == reference(tokenizer, chat(text))


@pytest.mark.parametrize("sizes", [{"max_length": 1}, {"batch_tokens": 0}])
def test_bad_sizes(qwen, sizes):
    with pytest.raises(UsageError, match="expected max_length >= 2 and batch_tokens >= 1"):
        FastSequencer(corpus(3), [0], qwen, **sizes)
