"""Sequencing: the template's tokens exactly, every dialogue alone and once per epoch, exact resume."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastsae.data import sequencing
from fastsae.data.buffer import MixingBuffer, activation_stream
from fastsae.data.sequencing import FastSequencer, render, special_token_ids
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
    monkeypatch.setattr(sequencing, "_WINDOW", 256)


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


@pytest.mark.parametrize(
    ("family", "special", "expected"),
    [
        ("qwen", {}, ["<|im_start|>", "<|im_end|>", "user", "assistant"]),
        ("qwen", {"bos_token": "<|im_start|>"}, ["<|im_start|>", "<|im_end|>", "user", "assistant"]),
        ("llama", {}, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "user", "assistant"]),
        ("gemma", {}, ["<start_of_turn>", "<end_of_turn>", "user", "model"]),
    ],
)
def test_special_tokens_of_each_family(family, special, expected):
    tokenizer = make_tokenizer(family, **special)
    found = special_token_ids(tokenizer)
    assert sorted(found) == sorted(expected)
    assert all(tokenizer.convert_tokens_to_ids(token) == index for token, index in found.items())


def test_extra_special_words(qwen):
    assert special_token_ids(qwen, ["system"]) == {
        **special_token_ids(qwen),
        "system": qwen.convert_tokens_to_ids("system"),
    }
    with pytest.raises(UsageError, match=r"'zqx': expected one token, but this tokenizer needs \d"):
        special_token_ids(qwen, ["zqx"])


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
        for ids, mask, index in zip(batch.input_ids, batch.attention_mask, batch.dialogue_ids.tolist(), strict=True):
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
            order[sequencer.epoch] += batch.dialogue_ids.tolist()

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
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "attention_mask", "dialogue_ids")
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
        stream = activation_stream(lambda ids, mask: table[ids], sequencer, drop_first_position=True)
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
    with pytest.raises(FastsaeError, match=r"all 4 dialogues were dropped.*must alternate"):
        next(sequencer)
    short = make_tokenizer("qwen", template="{{ messages[0]['content'] }}")
    sequencer = FastSequencer([chat("a"), chat("a b c")], range(2), short, endless=False)
    assert [batch.dialogue_ids.tolist() for batch in sequencer] == [[1]]
    assert sequencer.dropped == 1


@pytest.mark.parametrize("sizes", [{"max_length": 1}, {"batch_tokens": 0}])
def test_bad_sizes(qwen, sizes):
    with pytest.raises(UsageError, match="expected max_length >= 2 and batch_tokens >= 1"):
        FastSequencer(corpus(3), [0], qwen, **sizes)
