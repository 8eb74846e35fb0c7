"""Conversations: the class that holds them, and the script that talks in a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import functional_llm as flm
from functional_llm.training import read_records
from tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Any:
    tokenizer = flm.Tokenizer.from_preset(folder)
    return flm.TextGenerator(flm.Backbone.from_preset(folder), tokenizer)


def _fresh(chat: flm.Chat, messages: list[dict[str, str]]) -> str:
    """Returns the answer to messages without a cache of earlier turns."""
    generator: Any = chat.generator
    ids = generator.tokenizer.apply_chat_template(messages, tokenize=True)
    return "".join(generator.stream(ids, chat.max_new_tokens))


def test_turns_are_kept_and_their_cache_reused(generator: Any, tmp_path: Path) -> None:
    chat = flm.Chat(generator, "Be brief.", max_new_tokens=8)
    for number, text in enumerate(("The quick", "brown fox", "jumps")):
        messages = [*chat.messages, {"role": "user", "content": text}]
        expected = _fresh(chat, messages)
        size = generator.stats.prefill_tokens
        assert "".join(chat.say(text)) == expected
        assert chat.messages[-1] == {"role": "assistant", "content": expected}
        assert len(chat.messages) == 2 * number + 3
        assert (generator.stats.prefill_tokens < size) == (number > 0)
    chat.save(tmp_path / "chat.json")
    (record,) = read_records(tmp_path / "chat.json")
    assert record.fields == {"messages": chat.messages}
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert "".join(chat.say("The quick")) == record.fields["messages"][2]["content"]


def test_a_full_context_leaves_out_the_oldest_turns(generator: Any) -> None:
    chat = flm.Chat(generator, "Be brief.", max_new_tokens=16)  # the context has 512 tokens
    text = "The quick brown fox jumps over the lazy dog. " * 3
    left_out = []
    for _ in range(9):
        pieces = chat.say(text)
        left_out.append(chat.num_left_out)
        kept = [chat.messages[0], *chat.messages[1 + chat.num_left_out :]]
        messages = [*kept, {"role": "user", "content": text}]
        ids = generator.tokenizer.apply_chat_template(messages, tokenize=True)
        assert len(ids) + 16 <= 512
        assert kept[1:2] == [] or kept[1]["role"] == "user"
        expected = _fresh(chat, messages)
        assert "".join(pieces) == expected
    assert left_out[0] == 0 and left_out == sorted(left_out) and 0 < left_out[-1] < 16
    assert len(set(left_out)) < 5  # several turns at a time
    assert len(chat.messages) == 19


def test_what_cannot_be_said_changes_nothing(generator: Any) -> None:
    chat = flm.Chat(generator, max_new_tokens=20)
    assert "".join(chat.say("The quick"))
    before = list(chat.messages)
    with pytest.raises(ValueError, match="the model's context holds 512, the answer included"):
        chat.say("x" * 600)
    assert chat.messages == before
    pieces = chat.say("brown")
    pieces.close()  # before the first piece
    assert chat.messages == before
    pieces = chat.say("brown")
    part = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": part}
    question = {"role": "user", "content": "fox"}
    expected = _fresh(chat, [*chat.messages, question])
    assert "".join(chat.say("fox")) == expected
    with pytest.raises(ValueError, match="with a tokenizer"):
        flm.Chat(flm.TextGenerator(generator.backbone))


def test_a_cache_that_an_interrupt_has_spoilt_is_not_used(generator: Any) -> None:
    chat = flm.Chat(generator, max_new_tokens=40)
    decode = generator._programs.decode

    def interrupt(*arguments: Any) -> Any:
        decode(*arguments)  # which uses the state up
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator._programs, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(chat.say("The quick"))
    expected = _fresh(chat, [*chat.messages, {"role": "user", "content": "fox"}])
    assert "".join(chat.say("fox")) == expected


# Makes a terminal that of the process, to which its Ctrl-C goes then.
IN_FRONT = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background would ignore it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A program in a terminal of its own.

    Args:
        command: What `python` runs.
    """

    def __init__(self, *command: Any) -> None:
        self._terminal, side = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_FRONT, *map(str, command)],
            stdin=side,
            stdout=side,
            stderr=side,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
        )
        os.close(side)
        self._new = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt(self) -> None:
        """Types Ctrl-C, a little later: while it begins to read a line, Python may overlook it."""
        time.sleep(0.5)
        self.type("\x03")

    def read_to(self, pattern: str, seconds: float = 120) -> str:
        """Returns what is shown up to a pattern, without the terminal's codes."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self._new)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self._new!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                text = os.read(self._terminal, 1 << 16).decode(errors="replace")
                self._new += re.sub(r"\x1b(\[[?0-9;]*[a-zA-Z]|[78])", "", text)
        shown, self._new = self._new[: found.end()], self._new[found.end() :]
        return shown

    def end(self) -> int:
        """Returns the exit code."""
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._terminal)


REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_script_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    options = ["--preset", folder, "--max-new-tokens", "400", "--stats"]
    chat = Terminal(REPOSITORY / "scripts" / "chat.py", *options)
    try:
        chat.read_to("> ")
        chat.type("The quicj\x1b[D\x1b[C\x7fk\n")  # arrows and a correction
        shown = chat.read_to("decoded in [^>]*> ")
        assert "[compiling prefill and decode" in shown and "^[" not in shown
        chat.type("/frobnicate\n")
        chat.read_to("There is no command /frobnicate. /help lists them.\r\n> ")
        chat.type("/help\n")
        chat.read_to("/save FILE  writes")
        chat.read_to("> ")
        chat.type("brown \\\n")
        chat.read_to("\\.\\.\\. ")
        chat.type("fox\n")
        chat.read_to("decoded in [^>]*> ")
        chat.type("\x1b[A\n")  # the line before: fox
        chat.read_to("decoded in [^>]*> ")
        chat.type(f"/save {tmp_path}/chat.json\n")
        chat.read_to("6 messages are in ")
        chat.read_to("> ")
        messages = json.loads((tmp_path / "chat.json").read_text())[0]["messages"]
        assert [m["content"] for m in messages[::2]] == ["The quick", "brown \nfox", "fox"]
        chat.type("/clear\n")
        chat.read_to("is forgotten.\r\n> ")
        chat.interrupt()
        chat.read_to("Ctrl-C once more, or Ctrl-D, ends.\r\n> ")
        chat.type("\x04")
    finally:
        assert chat.end() == 0


SLOW = """
import sys, time
import functional_llm as flm
stream = flm.TextGenerator.stream
def slow(self, *arguments, **options):
    for piece in stream(self, *arguments, **options):
        yield piece
        time.sleep(0.2)
flm.TextGenerator.stream = slow
from functional_llm.commands.main import main
sys.exit(main())
"""


def test_ctrl_c_ends_the_answer_and_not_the_conversation(folder: Path) -> None:
    options = ["--preset", folder, "--max-new-tokens", "400"]
    chat = Terminal("-c", SLOW, "chat", *options)
    try:
        chat.read_to("> ")
        chat.type("The quick\n")
        chat.read_to("decode, once[^]]*\\]")
        chat.read_to("\\S")  # the first piece
        chat.interrupt()
        chat.read_to("\n> ", seconds=20)
        chat.type("/save /dev/null/no\n")
        chat.read_to("that can be written to. Received: /dev/null")
        chat.read_to("> ")
        chat.interrupt()
        chat.read_to("ends.\r\n> ")
        chat.interrupt()
    finally:
        assert chat.end() == 0
