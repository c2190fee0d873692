"""The commands that use what a run left: `tunesmith chat`, `generate` and `merge`, with their options."""

from __future__ import annotations

from typing import Annotated

import typer

Output = Annotated[
    str,
    typer.Argument(metavar="OUTPUT", help="A run, an adapter or a model: folder or hub id."),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Draw from the tokens with this much probability together.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Of random draws.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]


def chat_command(
    output: Output,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer, too.")] = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the result of a run.

    In it, /help lists what can be said to the chat itself. Where the input is no terminal each of its lines is a
    question, and answers are printed plain.
    """
    from tunesmith.cli.chat import ChatOptions, chat
    from tunesmith.config.terminal import open_console

    options = ChatOptions(
        output=output,
        system=system,
        base=base,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    raise typer.Exit(0 if chat(options, open_console()) else 1)


def generate_command(
    output: Output,
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPTS", help="Rows of `prompt` or `messages`, or a .txt file."),
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append to this file, and go on where it ends.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    base: Annotated[bool, typer.Option("--base", help="Add the base model's answers.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer the first rows only.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_tokens: MaxTokens = 512,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    trust_remote_code: Trust = False,
) -> None:
    """Answer a file of prompts in lines of JSON. Exit 1: not all were answered."""
    from rich.console import Console

    from tunesmith.cli.generate import GenerateOptions, generate

    options = GenerateOptions(
        output=output,
        prompts=prompts,
        out=out,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        batch=batch_size,
        base=base,
        limit=limit,
        trust_remote_code=trust_remote_code,
    )
    aside = Console(stderr=True)  # standard output holds answers alone
    raise typer.Exit(0 if generate(options, aside) else 1)


def merge_command(
    output: Output,
    directory: Annotated[
        str | None, typer.Argument(metavar="[DIRECTORY]", help="Where to; `merged` beside the adapter.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the files: bfloat16, float16 or float32.")] = "bfloat16",
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB or 500MB.")] = "5GB",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the files with base and adapter.")
    ] = True,
    trust_remote_code: Trust = False,
) -> None:
    """Merge an adapter into its base.

    The result is one model in safetensors, checked, that loads anywhere.
    """
    from tunesmith.cli.merge import MergeOptions, merge
    from tunesmith.config.terminal import open_console

    options = MergeOptions(
        output=output,
        directory=directory,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    merge(options, open_console())


def add_result_commands(app: typer.Typer) -> None:
    """Put the three commands on the application."""
    app.command("chat", epilog='Example: tunesmith chat runs/first --base --system "Be brief."')(chat_command)
    app.command("generate", epilog="Example: tunesmith generate runs/first test.jsonl --out answers.jsonl")(
        generate_command
    )
    app.command("merge", epilog="Example: tunesmith merge runs/first merged/")(merge_command)
