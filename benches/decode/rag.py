#!/usr/bin/env python3
"""Prompts in the manner of retrieval and of summaries, for `longspan bench decode`: one JSON object a line.

    benches/decode/rag.py [COUNT] < examples/kjv-genesis-to-deuteronomy.txt > rag.jsonl

Three passages of the text, then in turn: which of them speaks of a name (quote it), a summary in the text's words, a
list of who is named. The same text and count give the same prompts.
"""

import json
import random
import re
import sys

COMMON = {"The", "And", "But", "For", "Then", "Now", "LORD", "God", "Behold", "Thou", "Thus", "These", "This", "When"}


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    verses = re.sub(r"(?m)^\d?[A-Z][a-z]+\d+:\d+ ", "", sys.stdin.read())
    text = " ".join(verses.split())
    sentences = re.findall(r"[^.?!]+[.?!]+", text)
    rng = random.Random(54)
    for number in range(count):
        passages = []
        for _ in range(3):
            at, passage = rng.randrange(len(sentences) - 20), ""
            while len(passage) < 420:
                passage += sentences[at]
                at += 1
            passages.append(passage.strip())
        names = [n for n in re.findall(r"(?<=[a-z,;] )[A-Z][a-z]{3,}", passages[number % 3]) if n not in COMMON]
        name = rng.choice(names or ["Moses"])
        question = (
            f"Which passage speaks of {name}? Give its number and quote it word for word.",
            "Summarise the three passages in the words of the text, quoting the key sentences.",
            "List who is named in each passage, each with the sentence in which the name stands.",
        )[number // 3 % 3]
        found = "\n\n".join(f"[{i}] {p}" for i, p in enumerate(passages, 1))
        print(json.dumps({"prompt": f"{found}\n\n{question}"}))


main()
