"""The judge behind an endpoint: what it asks, and scores of a server that knows, or talks nonsense."""

import json
import re

import pytest
from endpoint_server import Reply, says, serving
from planted import TOPICS, WORDS, PlantedStore, on_words

from fastsae.errors import UsageError
from fastsae.interpret.judges import EndpointOptions, judge_maker
from fastsae.interpret.scores import score_features

WHICH = ("rubric", "detection", "intruder")


@pytest.fixture(scope="module")
def store():
    return PlantedStore([on_words(words) for words in TOPICS.values()])


def make(server, **options):
    return judge_maker(f"openai:small@{server.url}", endpoint=EndpointOptions(**options))(WORDS)


def topic_of(text):
    """The topic of most words."""
    words = re.findall(r"\w+", text)
    return max(TOPICS, key=lambda topic: sum(word in TOPICS[topic].split() for word in words))


def knows(body):
    """Answers as the truth is."""
    prompt = body["messages"][0]["content"]
    pieces = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
    if "Which piece does not belong" in prompt:
        marked = [" ".join(re.findall(r"<<(.*?)>>", piece)) for piece in pieces]
        topic = topic_of(" ".join(marked))
        (odd,) = [i for i, words in enumerate(marked, 1) if not set(words.split()) & set(TOPICS[topic].split())]
        return Reply(says(json.dumps({"piece": odd})))
    if "is explained so" in prompt:
        words = set(TOPICS[re.search(r'explained so: "(\w+)"', prompt)[1]].split())
        return Reply(says(json.dumps({"active": [int(bool(words & set(piece.split()))) for piece in pieces]})))
    if "Rate from 1 to 5" in prompt:
        active = re.findall(r'^" (\w+)"\t[1-9]', prompt, re.MULTILINE)
        shown = {topic for topic, words in TOPICS.items() if set(active) & set(words.split())}
        rating = {"score": 5, "name": topic_of(" ".join(active))} if len(shown) == 1 else {"score": 1, "name": "?"}
        return Reply(says(f"Here it is:\n```json\n{json.dumps(rating)}\n```"))
    return Reply(says(json.dumps({"explanation": topic_of(" ".join(re.findall(r"<<(.*?)>>", prompt)))})))


def test_a_server_that_knows_scores_1(store):
    with serving(knows) as server:
        found = score_features(store, make(server), WORDS, range(8), 0, WHICH)
    scores = found["scores"]
    assert scores["rubric"]["value"] == scores["intruder"]["value"] == 1
    assert scores["rubric"]["chance"]["value"] == 0
    assert scores["detection"]["balanced_accuracy"]["value"] == scores["detection"]["auroc"]["value"] == 1
    assert [row["rubric"]["name"] for row in found["features"]] == list(TOPICS)
    assert [summary["failed"] for summary in scores.values()] == [0, 0, 0]
    # ratings of 8 features and 8 controls, 8 explanations, 8 detections, 40 intruders
    assert found["judge"]["calls"] == 16 + 8 + 8 + 40


@pytest.mark.parametrize(
    "nonsense", ["I am not sure.", '{"thing": "x"}', "", None, '{"score": 9, "piece": 9, "active": []}']
)
def test_a_server_that_talks_nonsense_is_wrong_everywhere(store, nonsense):
    with serving(lambda body: Reply(says(nonsense))) as server:
        scores = score_features(store, make(server), WORDS, range(3), 0, WHICH)["scores"]
    assert scores["rubric"]["value"] == scores["intruder"]["value"] == 0
    assert scores["detection"]["balanced_accuracy"]["value"] == 0
    assert scores["rubric"]["failed"] == 3
    assert scores["detection"]["failed"] == scores["detection"]["judged"] == 60
    assert scores["intruder"]["failed"] == 15


def test_an_explanation_does_not_help_where_detections_cannot_be_read(store):
    def answer(body):
        return Reply(says("[[the weather]]" if "Explain" in body["messages"][0]["content"] else "1 1 1"))

    with serving(answer) as server:
        detection = score_features(store, make(server), WORDS, range(2), 0, ("detection",))["scores"]["detection"]
    assert len(server.bodies) == 4
    assert detection["failed"] == 40


def test_a_dry_run_counts_what_a_run_would_ask(store, tmp_path):
    with serving(knows) as server:
        dry = make(server, dry_run=True)
        score_features(store, dry, WORDS, range(4), 0, WHICH)
        assert not server.bodies
        score_features(store, real := make(server, cache=tmp_path), WORDS, range(4), 0, WHICH)
        assert dry.facts()["calls"] == real.facts()["calls"] == len(server.bodies)
        again = make(server, cache=tmp_path)
        score_features(store, again, WORDS, range(4), 0, WHICH)
        assert (again.facts()["calls"], again.facts()["cached"]) == (0, dry.facts()["calls"])


def test_prompts_tell_nothing_of_what_is_asked(store):
    with serving(knows) as server:
        score_features(store, make(server), WORDS, range(2), 0, ("detection", "intruder"))
    detections = [prompt for prompt in server.prompts if "is explained so" in prompt]
    assert detections
    assert not any("<<" in prompt for prompt in detections)
    intruders = [prompt for prompt in server.prompts if "does not belong" in prompt]
    assert all(prompt.count("\n") == intruders[0].count("\n") for prompt in intruders)
    for prompt in intruders:
        assert all("<<" in piece for piece in re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["", "gpt-4o", "hf:", "openai:gpt-4o", "openai:@https://x", "openai:gpt-4o@x", "embedding:x"]
)
def test_an_unknown_judge_is_named(name):
    with pytest.raises(UsageError, match="expected embedding, hf:MODEL or openai:MODEL@URL, got"):
        judge_maker(name)


def test_a_model_may_have_an_at_sign_in_its_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    facts = judge_maker("openai:@cf/meta/llama@2@https://x.example/v1/")(WORDS).facts()
    assert (facts["model"], facts["url"]) == ("@cf/meta/llama@2", "https://x.example/v1/chat/completions")
