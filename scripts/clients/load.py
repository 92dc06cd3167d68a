#!/usr/bin/env python3
"""Load and faults: clients that ask, drop, read slowly and send nonsense; afterwards nothing may be left.

usage: load.py http://127.0.0.1:8080 [--clients 64] [--minutes 10] [--tokens 32]
"""

import argparse
import asyncio
import collections
import json
import random
import time
import urllib.request
from urllib.parse import urlparse

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--clients", type=int, default=64)
parser.add_argument("--minutes", type=float, default=10)
parser.add_argument("--tokens", type=int, default=32)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()
url = urlparse(args.url)
end = time.monotonic() + 60 * args.minutes
count = collections.Counter()
slowest = 0.0


def request(body, path="/v1/chat/completions"):
    head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chat(rng, stream):
    words = " ".join(rng.choice("river stone lamp night bread winter song".split()) for _ in range(rng.randint(3, 200)))
    return json.dumps({
        "messages": [{"role": "user", "content": words}],
        "max_tokens": rng.randint(1, args.tokens), "temperature": 0.7, "seed": rng.randint(0, 9), "stream": stream,
    }).encode()


async def one(rng):
    global slowest
    kind = rng.choices(["ask", "stream", "drop", "slow", "json", "utf8", "large"], [8, 8, 3, 1, 1, 1, 0.2])[0]
    stream = kind in ("stream", "slow") or (kind == "drop" and rng.random() < 0.5)
    body = {"json": b'{"messages": [', "utf8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}'}.get(kind) or chat(rng, stream)
    start = time.monotonic()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        if kind == "large":
            writer.write(request(b"").replace(b"Content-Length: 0", b"Content-Length: 999999999"))
            writer.write(b" " * 100_000)
        else:
            writer.write(request(body))
        await writer.drain()
        if kind == "drop":
            await asyncio.sleep(rng.random() * 0.5)
            writer.transport.abort()
            count["dropped"] += 1
            return
        if kind == "slow":
            while data := await reader.read(64):
                await asyncio.sleep(0.05)
            count["slow"] += 1
            return
        if kind == "large":
            # Refused at once, or once it breaks off.
            await asyncio.sleep(0.2)
            count["large"] += 1
            return
        answer = await asyncio.wait_for(reader.read(), 600)
        status = answer.split(b" ", 2)[1].decode() if answer else "none"
        good = {"json": "400", "utf8": "400"}.get(kind, "200")
        whole = kind != "stream" or b"data: [DONE]" in answer
        if status == good and whole:
            count[f"{kind} {status}"] += 1
        elif status == "429":
            count["busy 429"] += 1
        else:
            count[f"WRONG {kind} {status}"] += 1
            print(answer[-300:])
        slowest = max(slowest, time.monotonic() - start)
    finally:
        writer.close()


async def client(number):
    rng = random.Random(args.seed * 1000 + number)
    while time.monotonic() < end:
        try:
            await one(rng)
        except (ConnectionError, asyncio.TimeoutError) as error:
            count[f"WRONG {type(error).__name__}"] += 1


async def main():
    await asyncio.gather(*(client(number) for number in range(args.clients)))


def gauges():
    text = urllib.request.urlopen(f"{args.url.rstrip('/')}/metrics").read().decode()
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line and line[0] != "#"}


def forget():
    """Lets go what is kept of finished talks."""
    urllib.request.urlopen(urllib.request.Request(f"{args.url.rstrip('/')}/v1/prefixes", method="DELETE")).read()


forget()
before = gauges()
asyncio.run(main())
waited = time.monotonic()
forget()
names = ["longspan_requests_queued", "longspan_requests_reading", "longspan_requests_writing", "longspan_kv_running_bytes", "longspan_kv_planes"]
while any((now := gauges())[name] != before[name] for name in names) and time.monotonic() - waited < 60:
    time.sleep(0.2)
for key, value in sorted(count.items()):
    print(f"{key:20} {value}")
print(f"slowest answer       {slowest:.1f} s")
for name in names:
    print(f"{name:32} {now[name]:.0f}, {before[name]:.0f} before")
print("passes", int(now["longspan_passes_total"]), "shared", int(now["longspan_shared_passes_total"]), "tokens written", int(now["longspan_answer_tokens_total"]))
bad = any(now[name] != before[name] for name in names) or any(key.startswith("WRONG") for key in count)
raise SystemExit(1 if bad else 0)
