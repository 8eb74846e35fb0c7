"""llama.cpp's server, from the wheel xllamacpp, in this process: its slots make a batch."""

import http.client
import json
import os
from pathlib import Path
from typing import Any

import xllamacpp

from benchmarks.conversions import converted
from benchmarks.engines.base import Engine


class LlamaCpp(Engine):
    """A slot for each prompt, each with a cache for the whole text.

    The wheel has no call that takes a batch of ids; `/completion` of its server does.
    """

    def __init__(self, weights: Path, precision: str, load_weights: bool = True) -> None:
        self._file = converted(weights, "gguf", precision)
        self._slots, self._server = (0, 0), None
        self._serve(1, 256)

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        self._serve(len(prompts), -(-(len(prompts[0]) + num_new) // 256) * 256)
        request = {
            "prompt": prompts,
            "n_predict": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answers = self._ask(request)
        return [answer["tokens"] for answer in sorted(answers, key=lambda x: x["index"])]

    def _serve(self, num_slots: int, length: int) -> None:
        """Starts a server whose caches are no larger than the work; the file stays mapped."""
        if self._slots == (num_slots, length):
            return
        self._server = None  # ends the one before
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(self._file)
        parameters.n_parallel, parameters.n_ctx = num_slots, num_slots * length
        for cpu in (parameters.cpuparams, parameters.cpuparams_batch):
            cpu.n_threads = len(os.sched_getaffinity(0))
        self._server = xllamacpp.Server(parameters)
        self._slots = (num_slots, length)

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        address = self._server.listening_address.removeprefix("http://")
        connection = http.client.HTTPConnection(address)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/completion", json.dumps(request), headers)
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in answer:
            raise RuntimeError(f"Expected ids from llama.cpp's server, received {answer['error']}.")
        return answer if isinstance(answer, list) else [answer]
