#!/usr/bin/env python3
"""Throughput of OpenAI-compatible servers side by side: long prompts, some at a time, and the first server's rate over the others'.

usage: throughput.py NAME=URL [NAME=URL ...] --text FILE [--start NAME=COMMAND ...] [--at 1,4,16] [--prompt 4096] [--answer 64]
example: throughput.py longspan=http://127.0.0.1:8091 llama.cpp=http://127.0.0.1:8092 --text book.txt
    --start "longspan=longspan serve --model m.gguf --listen 127.0.0.1:8091"
    --start "llama.cpp=llama-server -m m.gguf -c 90000 -np 16 --port 8092"
Prompts differ from their first word on, so that no server can reuse one; all servers get the same ones, in turn.
"""

import argparse
import concurrent.futures
import json
import shlex
import statistics
import subprocess
import time
import urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("servers", nargs="+", metavar="NAME=URL")
parser.add_argument("--start", action="append", default=[], metavar="NAME=COMMAND", help="run this first, and end it afterwards")
parser.add_argument("--at", default="1,4,16", help="requests at once")
parser.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt, about")
parser.add_argument("--answer", type=int, default=64, help="most tokens of an answer")
parser.add_argument("--text", required=True)
parser.add_argument("--json", action="store_true", help="one object a row")
args = parser.parse_args()
servers = dict(server.split("=", 1) for server in args.servers)
text = open(args.text, encoding="utf-8").read()
# About four characters a token; the servers say how many there were.
size = args.prompt * 4


def ask(url, number):
    at = number * size % max(1, len(text) - size)
    prompt = f"Part {number}. " + text[at : at + size]
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


def ready(name, url, process):
    while True:
        try:
            urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
            return
        except OSError as error:
            if process.poll() is not None:
                raise SystemExit(f"{name}: the server ended with {process.returncode} before it answered: {error}")
            time.sleep(0.2)


started = {}
try:
    for start in args.start:
        name, command = start.split("=", 1)
        started[name] = subprocess.Popen(shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for name, process in started.items():
        ready(name, servers[name].rstrip("/"), process)
    if not args.json:
        print("| server | at once | prompt tokens | answer tokens | seconds | tokens/s | first token, median s | rate over the first server's |")
        print("|---|---|---|---|---|---|---|---|")
    number = 0
    for at in map(int, args.at.split(",")):
        rate = None
        for name, url in servers.items():
            start = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(at) as pool:
                done = list(pool.map(lambda n: ask(url.rstrip("/"), n), range(number, number + at)))
            row = {
                "server": name, "at": at, "prompt_tokens": sum(d[1] for d in done), "answer_tokens": sum(d[2] for d in done),
                "seconds": time.monotonic() - start, "first_token": statistics.median(d[0] for d in done),
            }
            row["rate"] = (row["prompt_tokens"] + row["answer_tokens"]) / row["seconds"]
            rate = rate or row["rate"]
            row["ratio"] = row["rate"] / rate
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                print("| {server} | {at} | {prompt_tokens} | {answer_tokens} | {seconds:.1f} | {rate:.0f} | {first_token:.1f} | {ratio:.2f} |".format(**row), flush=True)
        number += at
finally:
    for process in started.values():
        process.terminate()
    for process in started.values():
        process.wait(30)
