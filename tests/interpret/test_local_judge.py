"""The judge that is a local language model: its answers against plain forward passes, and a model that knows nothing."""

import numpy as np
import pytest
import torch
from planted import TOPICS, WORDS, PlantedStore, on_words
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MambaConfig

from fastsae.data.demo import model_path
from fastsae.errors import FastsaeError, UsageError
from fastsae.interpret.judges import judge_maker
from fastsae.interpret.judges.causal_model import CausalModel
from fastsae.interpret.judges.local import LocalJudge
from fastsae.interpret.scores import score_features

PROMPTS = ["The text is about rain", "The text is about the court and its verdict", "Snow"]


def tiny(config, folder):
    """A random model with the tokenizer of the demo's."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(n):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=n, max_position_embeddings=4096, **sizes)


def gpt2(n):
    return GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, n_positions=2048)


def mamba(n):
    return MambaConfig(vocab_size=n, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.fixture(scope="module", params=[llama, gpt2, mamba], ids=["llama", "gpt2", "mamba"])
def model(request, tmp_path_factory):
    return CausalModel(tiny(request.param, tmp_path_factory.mktemp("model")))


def one_by_one(model, prompt):
    """Log-probabilities of Yes and No after a prompt, by one forward pass without padding or a cache."""
    turn = [{"role": "user", "content": prompt}]
    text = model._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + "Answer:"
    ids = model._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    following = [model._tokenizer(f"Answer: {word}").input_ids for word in ("Yes", "No")]
    assert following[0][:-1] != following[1]
    n = len(model._tokenizer("Answer:", add_special_tokens=False).input_ids)
    with torch.inference_mode():
        logits = model._model(ids).logits[0, -1].double()
    return torch.log_softmax(logits[[ids[n] for ids in following]], 0).numpy()


def test_batches_and_common_starts_change_nothing(model):
    expected = [one_by_one(model, prompt) for prompt in PROMPTS]
    apart = model.choose([[prompt] for prompt in PROMPTS], "Answer:", ("Yes", "No"), "asking")
    together = model.choose([PROMPTS, PROMPTS[:1]], "Answer:", ("Yes", "No"), "asking")
    np.testing.assert_allclose([found[0] for found in apart], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together[1][0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(together[0]).sum(1), 1)


def test_the_same_prompt_twice_shares_all_but_its_last_token(model):
    (found,) = model.choose([[PROMPTS[0]] * 2], "Answer:", ("Yes", "No"), "asking")
    np.testing.assert_allclose(found[0], one_by_one(model, PROMPTS[0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], found[1])


def test_what_is_written_does_not_depend_on_its_batch(model):
    together = model.write(PROMPTS, "Name:", 4, "naming")
    assert together == [model.write([prompt], "Name:", 4, "naming")[0] for prompt in PROMPTS]


def test_special_tokens_in_a_prompt_do_not_end_its_turn(model):
    special = model._tokenizer.all_special_tokens[0]
    token = model._tokenizer.convert_tokens_to_ids(special)
    assert model._encode(f"a {special} b").count(token) == model._encode("a b").count(token)


def test_a_model_that_knows_nothing_answers_everything_near_chance(tmp_path):
    store = PlantedStore([on_words(words) for words in TOPICS.values()])
    judge = judge_maker(f"hf:{tiny(llama, tmp_path)}")(WORDS)
    found = score_features(store, judge, WORDS, range(8), 0, ("rubric", "detection", "intruder"))
    scores = found["scores"]
    assert [summary["failed"] for summary in scores.values()] == [0, 0, 0]
    assert abs(scores["detection"]["balanced_accuracy"]["value"] - 0.5) < 4 * np.sqrt(
        0.25 / scores["detection"]["judged"]
    )
    assert abs(scores["intruder"]["value"] - 0.2) < 4 * np.sqrt(0.16 / scores["intruder"]["trials"])
    # 16 ratings, 8 names, 8 features of 20 windows, 4 + 4 that set the threshold and what they share, 40 intruders and a blank
    assert found["judge"]["prompts"] == 16 + 8 + 8 * 29 + 41


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_named(model):
    with pytest.raises(FastsaeError, match="does not tell same, same apart"):
        model.choose([["a"]], "Answer:", ("same", "same"), "asking")


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="found no folder"):
        judge_maker("hf:./nowhere")(WORDS)


def test_a_judge_without_a_template_reads_plain_text(model):
    model._has_template = False
    try:
        (rating,) = LocalJudge("hf:x", model, WORDS).rate([_evidence()])
    finally:
        model._has_template = True
    assert rating.score in range(1, 6)


def _evidence():
    from fastsae.interpret.judges.protocol import Evidence

    store = PlantedStore([on_words("rain snow")])
    return Evidence(store.examples(0).top[:5], ())
