from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_lightning.__main__ import main
from sft_lightning.data.templates.binding import bind_template


@pytest.fixture(scope="module")
def chat_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    config = AutoConfig.from_pretrained(model_dir)
    config.initializer_range = 0.3  # so that an answer depends on all of the conversation
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    bind_template("vicuna_v1.1", tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sft_lightning", "chat", f"--model={folder}", "--max_new_tokens=6", *options]


def answers(folder: Path, text: str, *options: str) -> list[str]:
    done = subprocess.run(command(folder, *options), input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.slow
def test_a_pipe_gets_one_line_per_prompt_and_nothing_else(chat_dir: Path) -> None:
    first, empty, other, again = answers(chat_dir, "Hi\n\nWhat is hot?\nHi\n")
    assert first == again  # lines are independent of each other
    assert empty == ""
    assert other
    assert ">" not in first[:1]


@pytest.mark.slow
def test_a_pipe_can_be_a_conversation(chat_dir: Path) -> None:
    first, second, third = answers(chat_dir, "Hi\nHi\n/reset\nHi\n/quit\nHi\n", "--history=true", "--system=Be kind.")
    assert first == third
    assert first != second


@pytest.fixture
def terminal(chat_dir: Path) -> Iterator[Callable[[str], str]]:
    """Type a line into a chat in a terminal, and return what is shown until the next prompt symbol."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(chat_dir), stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)

    def until_prompt(line: str = "") -> str:
        if line:
            os.write(ours, f"{line}\n".encode())
        shown, end = b"", time.monotonic() + 60
        while not shown.endswith(b"\n> ") and process.poll() is None and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(ours, 4096)
                except OSError:  # the other end was closed
                    break
        return shown.decode(errors="replace").replace("\r\n", "\n")

    until_prompt()
    yield until_prompt
    process.kill()
    process.wait()
    os.close(ours)


@pytest.mark.slow
def test_a_terminal_has_a_conversation_with_commands(terminal: Callable[[str], str]) -> None:
    first = terminal("Hi")
    assert first.startswith("Hi\n")
    assert "cut at --max_new_tokens" in first
    assert terminal("Hi") != first
    assert "/foo is not a command; /reset" in terminal("/foo")
    assert "conversation cleared" in terminal("/reset")
    assert terminal("Hi") == first
    assert "system: Be kind." in terminal("/system Be kind.")
    assert terminal("/quit").strip() == "/quit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model: required; name a model"),
        (["--model=./gone"], "--model: the folder './gone' does not exist"),
        (["--model=x", "--top_p=2"], "top_p: must be above 0 and at most 1"),
        (["--modle=x"], "Did you mean 'model'"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_reported_with_its_line(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n" + "long " * 600 + "\n"))
    assert main(["chat", f"--model={chat_dir}", "--max_new_tokens=2"]) == 2
    assert "line 2 of the input: the prompt has" in capsys.readouterr().err


def test_the_default_answer_takes_at_most_half_of_a_short_context(
    chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n"))
    assert main(["chat", f"--model={chat_dir}"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
