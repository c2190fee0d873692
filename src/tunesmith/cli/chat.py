"""`tunesmith chat`: a conversation on a terminal, or with lines of standard input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith.config.find_result import FoundResult, find_result
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import visible

if TYPE_CHECKING:
    from tunesmith.config.chat_session import ChatSession, Prompted

_WIDE = 120
"""Columns of a terminal from which on two answers stand side by side."""

_HELP = """\
/help          this list
/reset         forget the conversation; the system prompt stays
/system TEXT   set the system prompt and begin anew; without TEXT, take it away
/save FILE     append the conversation to FILE, as a row that tunesmith trains on
/quit          end (so does Ctrl-D)
Ctrl-C stops an answer; what has been written of it stays in the conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the command was asked for."""

    output: str
    system: str | None
    base: bool
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    trust_remote_code: bool


def chat(options: ChatOptions, console: Console, lines: TextIO | None = None) -> bool:
    """Talk until the input ends.

    Args:
        lines: where questions come from; standard input, where None.

    Returns:
        Whether all could be answered; on a terminal, where mistakes are mended at once, always.

    Raises:
        UserError: the result cannot be loaded, or has no base to show.
    """
    source = sys.stdin if lines is None else lines
    found = find_result(options.output)
    interactive = source.isatty() and console.is_terminal
    with console.status("loading the model") if interactive else contextlib.nullcontext():
        session = _session(options, found)
    note = _notes(session)
    if options.base:
        with session.loaded.base_only():
            pass  # refused now, and not at the first answer
    chatting = _Chat(session, console, base=options.base, interactive=interactive)
    if note:
        chatting.note(note)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # the arrow keys edit the line and bring back earlier ones
        chatting.note(f"{_who(session)} /help lists the commands, Ctrl-D ends.")
        chatting.run(_typed(chatting))
    else:
        chatting.run(line.rstrip("\r\n") for line in source)
    return interactive or chatting.failed == 0


def _session(options: ChatOptions, found: FoundResult) -> ChatSession:
    from tunesmith.config.chat_session import ChatSession
    from tunesmith.config.load_result import load_result
    from tunesmith.models.generate import Sampling
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    return ChatSession(
        load_result(found, trust_remote_code=options.trust_remote_code),
        Sampling(options.max_tokens, options.temperature, options.top_p),
        options.seed,
        options.system,
    )


def _notes(session: ChatSession) -> str:
    if session.loaded.prompter.has_template:
        return ""
    return "The tokenizer has no chat template, so ChatML is used; a model that never saw it answers oddly."


def _who(session: ChatSession) -> str:
    loaded = session.loaded
    held = {"nf4": " on a base in 4 bits", "int8": " on a base in 8 bits"}.get(loaded.quantize, "")
    kind = "an adapter" if loaded.adapter else "a model"
    return f"You are talking to {kind}{held}, on {loaded.model.device}."


def _typed(chatting: _Chat) -> Iterator[str]:
    """Lines of a person. Ctrl-C clears the line, Ctrl-D ends."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            chatting.note("\nCtrl-D or /quit ends.")
        except EOFError:
            chatting.console.print()
            return


@dataclass
class _Chat:
    """Prints a session."""

    session: ChatSession
    console: Console
    base: bool
    interactive: bool
    failed: int = 0
    left_out: int = 0
    ended: bool = False
    _commands: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self._commands = {
            "/help": lambda _: self.note(_HELP),
            "/reset": self._reset,
            "/system": self._system,
            "/save": self._save,
            "/quit": self._quit,
        }

    def note(self, text: str) -> None:
        """Something that is said about the chat, and is no answer."""
        if self.interactive:
            self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr)

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line."""
        for line in lines:
            if not line.strip():
                continue
            try:
                self._line(line.strip())
            except UserError as error:
                self.failed += 1
                self.note(f"error: {error}")
            if self.ended:
                return

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            raise UserError(f"There is no command {word}.", hint="/help lists them.")
        else:
            self._answer(line)

    def _reset(self, _: str) -> None:
        self.session.reset()
        self.left_out = 0
        self.note("The conversation begins anew.")

    def _system(self, text: str) -> None:
        self.session.system = text or None
        self._reset("")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file.", hint="Such as /save good-answers.jsonl")
        path = Path(name).expanduser()
        self.session.save(path)
        self.note(f"Appended to {path}: {counted(len(self.session.messages), 'message')} in one row.")

    def _quit(self, _: str) -> None:
        self.ended = True

    def _answer(self, question: str) -> None:
        prompted = self.session.ask(question)
        if prompted.left_out > self.left_out:
            context = self.session.loaded.context
            self.note(
                f"The first {counted(prompted.left_out, 'message')} no longer fit into the model's {context:,} "
                "tokens and are left out."
            )
        self.left_out = prompted.left_out
        if self.base and self.interactive and self.console.width >= _WIDE:
            text = self._side_by_side(prompted)
        elif self.base:
            text = self._one(prompted, "adapter", base=False)
            self._one(prompted, "base", base=True)
        else:
            text = self._one(prompted, "", base=False)
        if text:
            self.session.reply(text)
        else:
            self.session.take_back()
            self.note("The answer is empty; the question is not kept.")

    def _generate(self, prompted: Prompted, hand_on: Callable[[str], None], *, base: bool) -> str:
        """An answer, or the part of it that was written before Ctrl-C."""
        written: list[str] = []

        def both(piece: str) -> None:
            written.append(piece)
            hand_on(piece)

        try:
            return self.session.answer(prompted, both, base=base)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.note(" (stopped)")
            return "".join(written).strip()

    def _one(self, prompted: Prompted, label: str, *, base: bool) -> str:
        """Stream an answer."""
        if label:
            self.console.print(f"{label}: ", style="bold", end="", highlight=False)
        text = self._generate(
            prompted,
            lambda piece: self.console.out(visible(piece), end="", highlight=False),
            base=base,
        )
        self.console.print()
        return text

    def _side_by_side(self, prompted: Prompted) -> str:
        """Stream the adapter's answer into the left column and the base's into the right one."""
        shown = ["", ""]
        texts = ["", ""]
        with Live(console=self.console, transient=True, vertical_overflow="ellipsis") as live:
            for column in (0, 1):

                def hand_on(piece: str, column: int = column) -> None:
                    shown[column] += visible(piece)
                    live.update(_columns(shown))

                texts[column] = self._generate(prompted, hand_on, base=column == 1)
        self.console.print(_columns(shown))
        return texts[0]


def _columns(texts: list[str]) -> Table:
    table = Table.grid(padding=(0, 4), expand=True)
    for _ in texts:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(Text("adapter", "bold"), Text("base", "bold"))
    table.add_row(*(Text(text.strip()) for text in texts))
    return table
