"""Made-up dialogues and features whose meaning is known, in a store that lives in memory."""

from __future__ import annotations

from functools import cache

import numpy as np

from fastsae.interpret.windows import WINDOW, FeatureExamples, Window

TOPICS = {
    "cooking": "onion garlic butter oven recipe flour sugar boil simmer pepper sauce bake dough spoon salad soup",
    "space": "planet orbit telescope galaxy rocket comet moon astronaut satellite gravity star nebula lunar solar",
    "law": "court judge lawyer verdict contract lawsuit appeal witness jury statute defendant plaintiff trial legal",
    "football": "goal striker referee penalty league coach stadium midfielder tackle goalkeeper match kick team",
    "medicine": "doctor patient surgery nurse symptom vaccine diagnosis hospital infection therapy disease clinic",
    "music": "guitar melody piano chord violin concert rhythm orchestra singer drum album song harmony tune",
    "weather": "rain snow thunder forecast cloud storm humid wind hail sunny drizzle fog blizzard temperature",
    "money": "bank loan interest mortgage dividend stock investor currency budget savings debt tax invoice profit",
}
FILLERS = (
    "the of and a to in is that it was for on are with as they at be this have from or had by not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other into "
    "has more her two like him see time could no make than first been its who now people my made over did down only way find "
    "use may long little very after words called just where most know get through back much before go good new write our "
    "used me man too any day same right look think also around another came come work three word must because does part"
).split()


class Words:
    """A tokenizer whose tokens are whole words."""

    all_special_ids = (0,)

    def __init__(self):
        self.words = ["<|im_start|>", *FILLERS, *(word for words in TOPICS.values() for word in words.split())]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def decode(self, ids):
        return "".join(self.words[i] if i == 0 else " " + self.words[i] for i in ids)


WORDS = Words()


@cache
def planted_dialogues(n=400, seed=0):
    """Dialogues of 60 to 120 words, each about one topic with a third of its words, and about another one with a few."""
    random = np.random.default_rng(seed)
    topics = [[WORDS.ids[word] for word in words.split()] for words in TOPICS.values()]
    fillers = [WORDS.ids[word] for word in FILLERS]
    found = []
    for _ in range(n):
        main, aside = random.choice(len(topics), 2, replace=False)
        sources = random.choice(3, size=random.integers(60, 120), p=[0.6, 0.32, 0.08])
        found.append([0, *(int(random.choice((fillers, topics[main], topics[aside])[source])) for source in sources)])
    return found


class PlantedStore:
    """Serves windows of features that are functions of a dialogue: `feature(tokens, random) -> activations`."""

    def __init__(self, features, dialogues=None, n_top=20, n_sampled=40, seed=1):
        self._dialogues = dialogues or planted_dialogues()
        random = np.random.default_rng(seed)
        self._acts = [
            [np.asarray(feature(tokens, random), float) for tokens in self._dialogues] for feature in features
        ]
        self._n_top, self._n_sampled, self._seed = n_top, n_sampled, seed

    def alive(self, min_windows):
        return [k for k, acts in enumerate(self._acts) if sum(bool(of_one.max() > 0) for of_one in acts) >= min_windows]

    def examples(self, feature):
        acts = self._acts[feature]
        random = np.random.default_rng((self._seed, feature))
        top = [self._window(feature, i, int(a.argmax())) for i, a in enumerate(acts) if a.max() > 0]
        firing = [(i, random.choice(np.flatnonzero(a))) for i, a in enumerate(acts) if a.max() > 0]
        chosen = random.choice(len(firing), min(len(firing), self._n_sampled), replace=False)
        sampled = [self._window(feature, firing[j][0], int(firing[j][1])) for j in chosen]
        top, sampled = (sorted(windows, key=lambda window: -window.value) for windows in (top, sampled))
        flat = np.concatenate(acts)
        return FeatureExamples(
            feature=feature,
            count=int((flat > 0).sum()),
            density=float((flat > 0).mean()),
            maximum=float(flat.max()),
            mean_special=0.0,
            edges=(0.0, 1.0),
            histogram=(0,),
            top=tuple(top[: self._n_top]),
            sampled=tuple(sampled),
        )

    def silent(self, feature, n, *, seed, exclude):
        random = np.random.default_rng(seed)
        windows = []
        for i in random.permutation(len(self._dialogues)):
            if int(i) not in exclude:
                window = self._window(feature, int(i), int(random.integers(len(self._dialogues[i]))))
                if not any(window.activations):
                    windows.append(window)
        return windows[:n]

    def _window(self, feature, dialogue, at):
        tokens = self._dialogues[dialogue]
        start = max(0, min(at - WINDOW // 2, len(tokens) - WINDOW))
        part = slice(start, start + WINDOW)
        return Window(
            dialogue=dialogue,
            start=start,
            tokens=tuple(tokens[part]),
            kinds=("user",) * len(tokens[part]),
            activations=tuple(self._acts[feature][dialogue][part].tolist()),
            peak=at - start,
        )


def on_words(words):
    """A feature that fires on these words, more or less."""
    ids = {WORDS.ids[word] for word in words.split()}
    return lambda tokens, random: [random.uniform(1, 10) if token in ids else 0 for token in tokens]


def on_some_words(words, share=0.1):
    """A feature that fires on a share of these words' places."""
    ids = {WORDS.ids[word] for word in words.split()}
    return lambda tokens, random: [
        random.uniform(1, 10) if token in ids and random.random() < share else 0 for token in tokens
    ]


def at_random(share=0.01):
    """A feature that fires anywhere."""
    return lambda tokens, random: [random.uniform(1, 10) if random.random() < share else 0 for _ in tokens]
