#!/usr/bin/env python3
"""Throughput of one or several OpenAI-compatible servers: long prompts, some at a time.

usage: throughput.py NAME=http://127.0.0.1:8080 [NAME=URL ...] [--at 1,4,16] [--prompt 4096] [--answer 64] [--text FILE]
Prompts differ from their first word on, so that no server can reuse one.
"""

import argparse
import concurrent.futures
import json
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("servers", nargs="+")
parser.add_argument("--at", default="1,4,16")
parser.add_argument("--prompt", type=int, default=4096)
parser.add_argument("--answer", type=int, default=64)
parser.add_argument("--text", required=True)
args = parser.parse_args()
text = open(args.text, encoding="utf-8").read()
# About four characters a token; the servers say how many there were.
size = args.prompt * 4


def ask(url, number):
    prompt = f"Part {number}. " + text[number * size : (number + 1) * size]
    body = {"prompt": prompt, "max_tokens": args.answer, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    start, first, usage = time.monotonic(), None, None
    with urllib.request.urlopen(request, timeout=1200) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            if first is None and event.get("choices") and event["choices"][0].get("text"):
                first = time.monotonic() - start
    return first or time.monotonic() - start, usage["prompt_tokens"], usage["completion_tokens"]


turn = 0
print("| server | at once | prompt tokens | answer tokens | seconds | tokens/s read and written | first token, median s |")
print("|---|---|---|---|---|---|---|")
for at in map(int, args.at.split(",")):
    for server in args.servers:
        name, url = server.split("=", 1)
        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(at) as pool:
            done = list(pool.map(lambda number: ask(url.rstrip("/"), number), range(turn, turn + at)))
        seconds = time.monotonic() - start
        read, written = sum(d[1] for d in done), sum(d[2] for d in done)
        first = sorted(d[0] for d in done)[at // 2]
        print(f"| {name} | {at} | {read} | {written} | {seconds:.1f} | {(read + written) / seconds:.0f} | {first:.1f} |", flush=True)
    turn += at
