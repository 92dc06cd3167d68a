#!/usr/bin/env python3
"""The official `openai` package and curl against a server: chat, streams, log probabilities, embeddings, errors.

usage: openai_client.py http://127.0.0.1:8080   (pip install openai; LONGSPAN_API_KEY if the server has a key)
"""

import json
import os
import subprocess
import sys

import openai

base = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8080"
key = os.environ.get("LONGSPAN_API_KEY", "none")
client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)
model = client.models.list().data[0].id
ask = [{"role": "user", "content": "Name three rivers."}]


def check(name, good, shown=""):
    print(f"{'ok  ' if good else 'FAIL'} {name} {shown}")
    if not good:
        sys.exit(1)


reply = client.chat.completions.create(model=model, messages=ask, max_tokens=24, temperature=0)
text = reply.choices[0].message.content
check("chat", bool(text) and reply.usage.completion_tokens > 0, repr(text[:60]))

pieces, usage = [], None
stream = client.chat.completions.create(
    model=model, messages=ask, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        pieces.append(chunk.choices[0].delta.content)
    usage = chunk.usage or usage
check("stream folds to the whole answer", "".join(pieces) == text, f"{len(pieces)} pieces")
check("stream usage", usage.completion_tokens == reply.usage.completion_tokens)

reply = client.chat.completions.create(
    model=model, messages=ask, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
)
listed = reply.choices[0].logprobs.content
check("log probabilities", len(listed) >= 7 and all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in listed))

written = b"".join(bytes(t.bytes) for t in listed).decode(errors="replace")
check("their bytes are the text", written.removeprefix(" ") == reply.choices[0].message.content.removeprefix(" "))

info = client.models.retrieve(model)
for name in info.aliases or [model]:
    same = client.chat.completions.create(model=name, messages=ask, max_tokens=2, temperature=0)
    check("another name of the model", same.model == model, name)

reply = client.chat.completions.create(model=model, messages=ask, max_tokens=8, n=2, temperature=1, seed=7)
again = client.chat.completions.create(model=model, messages=ask, max_tokens=8, n=2, temperature=1, seed=7)
texts = [c.message.content for c in reply.choices]
check("n and seed", len(texts) == 2 and texts == [c.message.content for c in again.choices])

reply = client.completions.create(model=model, prompt="One two three", max_tokens=0, echo=True, logprobs=1)
lists = reply.choices[0].logprobs
check("echo scores the prompt", reply.choices[0].text == "One two three" and all(p <= 0 for p in lists.token_logprobs[1:]))

document = "The lighthouse keeper is called Marta. " * 20
reply = client.chat.completions.create(
    model=model, messages=ask, max_tokens=4, temperature=0, extra_body={"context": "window:256", "decode": "greedy"}
)
check("our fields", reply.longspan["context"].startswith("window"))
upload = client.post("/documents", cast_to=object, body={"name": "keeper", "text": document})
question = [{"role": "user", "content": "Who keeps the lighthouse?"}]
reply = client.chat.completions.create(
    model=model, messages=question, max_tokens=16, temperature=0, extra_body={"session": upload["id"], "show_context": True}
)
check("session", reply.usage.prompt_tokens_details.cached_tokens == upload["tokens"] and reply.longspan["looked"], repr(reply.choices[0].message.content))
client.delete(f"/documents/{upload['id']}", cast_to=object)

for name, kind, call in [
    ("unknown model", openai.NotFoundError, lambda: client.chat.completions.create(model="other", messages=ask)),
    ("impossible value", openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=ask, temperature=-1)),
    ("too long", openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=ask, max_tokens=10**9)),
]:
    try:
        call()
        check(name, False)
    except kind as error:
        check(name, bool(error.body["message"]) and bool(error.body["code"]), f"{error.body['code']} {error.body['param']}")

try:
    vectors = client.embeddings.create(model="embedder", input=["a boat", "a ship", "tax law"]).data
    near = lambda a, b: sum(x * y for x, y in zip(vectors[a].embedding, vectors[b].embedding))
    check("embeddings", near(0, 1) > near(0, 2), f"{near(0, 1):.3f} > {near(0, 2):.3f}")
except openai.NotFoundError as error:
    check("embeddings are refused without a model", error.body["code"] == "model_not_found")

header = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
curl = lambda *words: subprocess.run(["curl", "-sS", *header, *words], capture_output=True, text=True, check=True).stdout
body = json.dumps({"messages": ask, "max_tokens": 8, "temperature": 0})
check("curl chat", json.loads(curl("-d", body, f"{base}/v1/chat/completions"))["choices"][0]["message"]["content"])
body = json.dumps({"messages": ask, "max_tokens": 8, "temperature": 0, "stream": True})
check("curl stream", curl("-N", "-d", body, f"{base}/v1/chat/completions").rstrip().endswith("data: [DONE]"))
check("curl error", json.loads(curl("-d", "{", f"{base}/v1/chat/completions"))["error"]["code"] == "invalid_json")
check("curl health", curl(f"{base}/healthz") == "ok\n")
