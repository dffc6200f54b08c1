"""The text of windows: marks, special tokens, and tokenizers that leave spaces out."""

from planted import WORDS

from fastsae.interpret.disguise import disguised, unmarked
from fastsae.interpret.text import WindowTexts
from fastsae.interpret.windows import Window


def window(words, activations, peak=0, dialogue=0):
    tokens = tuple(WORDS.ids[word] for word in words.split())
    return Window(dialogue, 0, tokens, ("user",) * len(tokens), tuple(map(float, activations)), peak)


def test_neighbouring_strong_tokens_share_a_mark():
    texts = WindowTexts(WORDS)
    assert (
        texts.marked(window("the rain and snow boil onion", [0, 2, 0, 10, 9, 1])) == " the rain and <<snow boil>> onion"
    )
    assert texts.marked(window("rain and snow", [5, 0, 5])) == " <<rain>> and <<snow>>"


def test_a_window_without_activations_has_no_mark():
    silent = window("the rain", [0, 0])
    assert WindowTexts(WORDS).marked(silent) == WindowTexts(WORDS).plain(silent) == " the rain"


def test_special_tokens_cannot_end_a_turn_of_the_prompt():
    assert WindowTexts(WORDS).plain(window("<|im_start|> the", [0, 0])) == "[im_start] the"


def test_a_tokenizer_of_sentencepiece_keeps_its_spaces():
    class Pieces:
        all_special_ids = ()
        words = ("\u2581rain", "fall")

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).replace("\u2581", " ").strip()

        def convert_ids_to_tokens(self, token):
            return self.words[token]

    assert WindowTexts(Pieces()).plain(Window(0, 0, (0, 1), ("user",) * 2, (0.0, 0.0), 0)) == " rainfall"


def test_unmarked_windows_keep_their_text_alone():
    plain = unmarked(window("rain and snow", [5, 0, 5], peak=2))
    assert (plain.activations, plain.peak, plain.value) == ((0.0, 0.0, 0.0), 2, 0.0)


def test_a_silent_window_borrows_activations_peak_on_peak():
    silent, firing = window("court the jury of", [0] * 4, peak=1), window("rain and snow", [1, 2, 3], peak=2)
    assert disguised(silent, firing).activations == (2.0, 3.0, 0.0, 0.0)
    assert disguised(silent, firing).tokens == silent.tokens
    at_the_start = window("rain and snow", [3, 2, 1], peak=0)
    assert disguised(silent, at_the_start).activations == (0.0, 3.0, 2.0, 1.0)
