"""An HTTP server that plays the judge: chat completions in OpenAI's protocol and in Ollama's."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import local_web

from gptsmith.evaluate.options import JudgeOptions
from gptsmith.evaluate.reference_metrics import Entry

Reply = str | tuple[int, dict[str, str], str]  # an answer, or status, headers and body


class Server(local_web.Server):
    """Speaks both protocols. `reply` gets the prompt and the number of earlier requests for it."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.seen: list[dict[str, Any]] = []  # path, key and body of every request
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append(
                {"path": self.path, "key": self.headers["Authorization"], "body": body}
            )
            before = self.server.asked[prompt]
            self.server.asked[prompt] += 1
        reply = self.server.reply(prompt, before)
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            ollama = {"message": message, "prompt_eval_count": 100, "eval_count": 20}
            openai = {"choices": [{"message": message}]}
            reply = (200, {}, json.dumps(ollama if self.path == "/api/chat" else openai))
        status, headers, text = reply
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def worth(n: int) -> Entry:
    """An answer to which `fair` gives the score n."""
    return Entry(f"e{n}", f"What is {n}?", f"It is {n}.", f"worth {n} points")


def fair(prompt: str, before: int = 0) -> str:
    return json.dumps({"reason": "so", "score": int(re.findall(r"worth (\d+) points", prompt)[-1])})


def options(server: Server, **more: Any) -> JudgeOptions:
    return JudgeOptions(**{"url": server.url, "model": "judge", "timeout": 5.0, **more})
