#!/usr/bin/env python3
"""Hugging Face transformers behind the OpenAI dialect, so that `longspan eval --endpoint` can put the same samples to it.

    hf_server.py MODEL.gguf [--port 8899] [--threads 2] [--dtype float32|bfloat16]

Serves /v1/models, /v1/chat/completions, /v1/completions (with `echo`: log-probabilities of the prompt's tokens) and
/tokenize on the loopback address: greedy decoding only, no streaming, one request at a time. Weights are the file's,
dequantised. Prompts are cut into tokens by the file's own tokenizer; chats by its own template. Since the server counts
tokens, lengths mean the same there and here. Then, for example

    longspan eval ruler/niah_single_1 passkey --lengths 1k --samples 20 --endpoint http://127.0.0.1:8899/v1 \\
        --completions --concurrency 1 --out runs/transformers
    longspan eval ruler/niah_single_1 passkey --lengths 1k --samples 20 --model MODEL.gguf --chat never --out runs/longspan
    longspan compare runs/transformers runs/longspan
"""

import argparse
import http.server
import json
import pathlib
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


class Model:
    def __init__(self, path, dtype):
        path = path.resolve()
        self.name = path.name
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.no_grad()
    def echo(self, ids):
        """Log-probability of each token given those before it; None for the first. Logits exist for 256 tokens at a time."""
        cache, all = None, [None]
        for at in range(0, len(ids), 256):
            piece = ids[at : at + 256]
            reply = self.model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            cache = reply.past_key_values
            rows = torch.log_softmax(reply.logits[0].float(), -1)
            wanted = ids[at + 1 : at + 1 + len(piece)]
            all += rows[torch.arange(len(wanted)), torch.tensor(wanted, dtype=torch.long)].tolist()
        return all

    def offsets(self, text, ids):
        """Where each token begins in `text`, in characters."""
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        extra = len(ids) - len(found["input_ids"])
        return [0] * extra + [begin for begin, _ in found["offset_mapping"]]

    @torch.no_grad()
    def answer(self, ids, limit, stop):
        """Greedy continuation of `ids`: text, number of tokens, reason of the end."""
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end]) | {self.tokenizer.eos_token_id}
        end_of_turn = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        if isinstance(end_of_turn, int):
            ends.add(end_of_turn)
        cache, step, out, text = None, torch.tensor([ids]), [], ""
        while len(out) < limit:
            reply = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = reply.past_key_values, int(reply.logits[0, -1].argmax())
            if token in ends:
                return text, len(out), "stop"
            out.append(token)
            text = self.tokenizer.decode(out, skip_special_tokens=True)
            found = [text.find(s) for s in stop if s in text]
            if found:
                return text[: min(found)], len(out), "stop"
            step = torch.tensor([[token]])
        return text, len(out), "length"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model = None

    def log_message(self, *_):
        pass

    def send(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def echo(self, text, ids):
        offsets = self.model.offsets(text, ids)
        ends = offsets[1:] + [len(text)]
        logprobs = {"tokens": [text[a:b] for a, b in zip(offsets, ends)], "token_logprobs": self.model.echo(ids),
                    "text_offset": offsets, "top_logprobs": None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        self.send(200, {"id": f"hf-{time.time_ns()}", "object": "text_completion", "created": int(time.time()),
                        "model": self.model.name, "usage": usage,
                        "choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}]})

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{
            "id": self.model.name, "object": "model", "abilities": ["chat", "complete", "echo", "tokenize"]}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokenizer = self.model.tokenizer
        if self.path == "/tokenize":
            special = request.get("add_special_tokens", True)
            count = lambda text: len(tokenizer(text, add_special_tokens=special)["input_ids"])
            if request.get("prompts") is not None:
                counts = [count(text) for text in request["prompts"]]
                return self.send(200, {"count": sum(counts), "counts": counts, "tokens": []})
            if request.get("messages"):
                ids = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
                return self.send(200, {"count": len(ids), "tokens": list(ids)})
            ids = tokenizer(request["prompt"], add_special_tokens=special)["input_ids"]
            return self.send(200, {"count": len(ids), "tokens": list(ids)})
        chat = self.path.endswith("/chat/completions")
        if chat:
            ids = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        elif self.path.endswith("/completions"):
            ids = tokenizer(request["prompt"])["input_ids"]
        else:
            return self.send(404, {"error": {"message": f"no {self.path} here", "type": "not_found"}})
        if request.get("temperature", 0) != 0 or request.get("stream"):
            return self.send(400, {"error": {"message": "temperature 0 and no streaming only", "type": "invalid_request_error"}})
        if request.get("echo"):
            return self.echo(request["prompt"], list(ids))
        limit = request.get("max_tokens") or request.get("max_completion_tokens") or 128
        stop = request.get("stop") or []
        text, count, reason = self.model.answer(list(ids), limit, [stop] if isinstance(stop, str) else stop)
        choice = {"index": 0, "finish_reason": reason}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}
        self.send(200, {"id": f"hf-{time.time_ns()}", "object": "chat.completion" if chat else "text_completion",
                        "created": int(time.time()), "model": self.model.name, "choices": [choice], "usage": usage})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    Handler.model = Model(options.model, getattr(torch, options.dtype))
    server = http.server.HTTPServer(("127.0.0.1", options.port), Handler)
    print(f"{options.model.name} on http://127.0.0.1:{options.port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
