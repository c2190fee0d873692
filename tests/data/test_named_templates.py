# ruff: noqa: E501
"""Named templates: text, tokens and mask of each, worked out by hand from the published format.

In the expected texts `«` and `»` stand around what trains.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation
from tunesmith.data.named_templates import TEMPLATES, missing_control
from tunesmith.data.render import NOTE_CHATML, NOTE_DATE, NOTE_END, NOTE_THINKING, Renderer, resolve_template
from tunesmith.data.template import ChatTemplate

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao!"},
]
THINKING: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "Greet."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao!", "reasoning_content": "Part."},
]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "a city"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOL = {
    "type": "function",
    "function": {"name": "sky", "description": "the weather", "parameters": PARAMETERS},
}
JSON = (
    '{"type": "function", "function": {"name": "sky", "description": "the weather", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string", "description": "a city"}, '
    '"days": {"type": "integer"}}, "required": ["city"]}}}'
)
INDENTED = """{
    "type": "function",
    "function": {
        "name": "sky",
        "description": "the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string",
                    "description": "a city"
                },
                "days": {
                    "type": "integer"
                }
            },
            "required": [
                "city"
            ]
        }
    }
}"""
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
]
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{JSON}\n</tools>\n\nFor each function call, return a json "
    "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-01-01\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message."
)
LLAMA_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2025\n\n"
LLAMA3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
HERMES = (
    "You can call functions to answer the user. Their signatures, one JSON object per line:\n<tools>\n"
    f"{JSON}\n</tools>\nTo call a function, write its name and its arguments as one JSON object between tags:\n"
    '<tool_call>\n{"name": "FUNCTION", "arguments": {"ARGUMENT": "VALUE"}}\n</tool_call>\n'
    "The result follows between <tool_response> tags."
)
CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call>'
RESULT = "<tool_response>\nrain\n</tool_response>"


def llama3(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


def llama4(role: str, text: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n{text}<|eot|>"


def gemma(role: str, text: str) -> str:
    return f"<start_of_turn>{role}\n{text}<end_of_turn>"


def im(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>"


def trained(layout: Any, role: str, text: str) -> str:
    """A turn of which all but its header trains."""
    whole: str = layout(role, text)
    return whole.replace(text, "«" + text, 1) + "»"


GEMMA_TURNS = (
    gemma("user", "%sHi") + "\n" + trained(gemma, "model", "Hello!") + "\n"
    + gemma("user", "Bye") + "\n" + trained(gemma, "model", "Ciao!") + "\n"
)  # fmt: skip
GEMMA_TOOLS = (
    "<bos>" + gemma("user", HERMES + "\n\nOslo?") + "\n" + trained(gemma, "model", CALL) + "\n"
    + gemma("user", RESULT) + "\n" + trained(gemma, "model", "Rain.") + "\n"
)  # fmt: skip
CHATML_TURNS = (
    im("user", "Hi") + "\n" + trained(im, "assistant", "Hello!") + "\n"
    + im("user", "Bye") + "\n" + trained(im, "assistant", "Ciao!") + "\n"
)  # fmt: skip


def phi(role: str, text: str) -> str:
    return f"<|im_start|>{role}<|im_sep|>{text}<|im_end|>"


def as_text(layout: Any, end: str, result_role: str) -> str:
    """The tool conversation where the layout has no tools: Hermes' notation in the content of turns."""
    return (
        layout("system", HERMES) + end + layout("user", "Oslo?") + end + trained(layout, "assistant", CALL) + end
        + layout(result_role, RESULT) + end + trained(layout, "assistant", "Rain.") + end
    )  # fmt: skip


def plain_turns(layout: Any, end: str = "") -> str:
    return (
        layout("user", "Hi") + end + trained(layout, "assistant", "Hello!") + end
        + layout("user", "Bye") + end + trained(layout, "assistant", "Ciao!") + end
    )  # fmt: skip


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

GOLDEN: list[tuple[str, str, list[dict[str, Any]], bool, str]] = [
    ("chatml", "system", [SYSTEM, *TURNS], False, im("system", "Be brief.") + "\n" + CHATML_TURNS),
    ("chatml", "turns", TURNS, False, CHATML_TURNS),
    ("chatml", "tools", CALLING, True, as_text(im, "\n", "tool")),
    ("llama-3", "system", [SYSTEM, *TURNS], False,
     LLAMA3 + LLAMA_DATE + "Be brief.<|eot_id|>" + plain_turns(llama3)),
    ("llama-3", "turns", TURNS, False, LLAMA3 + LLAMA_DATE + "<|eot_id|>" + plain_turns(llama3)),
    ("llama-3", "tools", CALLING, True,
     LLAMA3 + "Environment: ipython\n" + LLAMA_DATE + "<|eot_id|>"
     + llama3("user", "Given the following functions, please respond with a JSON for a function call with its "
              "proper arguments that best answers the given prompt.\n\nRespond in the format {\"name\": function "
              "name, \"parameters\": dictionary of argument name and its value}.Do not use variables.\n\n"
              + INDENTED + "\n\nOslo?")
     + trained(llama3, "assistant", '{"name": "sky", "parameters": {"city": "Oslo"}}')
     + llama3("ipython", '"rain"') + trained(llama3, "assistant", "Rain.")),
    ("llama-4", "system", [SYSTEM, *TURNS], False,
     "<|begin_of_text|>" + llama4("system", "Be brief.") + plain_turns(llama4)),
    ("llama-4", "turns", TURNS, False, "<|begin_of_text|>" + plain_turns(llama4)),
    ("llama-4", "tools", CALLING, True, "<|begin_of_text|>" + as_text(llama4, "", "user")),
    ("mistral", "system", [SYSTEM, *TURNS], False,
     "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]«Hello!</s>»[INST]Bye[/INST]«Ciao!</s>»"),
    ("mistral", "turns", TURNS, False, "<s>[INST]Hi[/INST]«Hello!</s>»[INST]Bye[/INST]«Ciao!</s>»"),
    ("mistral", "tools", CALLING, True,
     f"<s>[AVAILABLE_TOOLS][{JSON}][/AVAILABLE_TOOLS][INST]Oslo?[/INST]«[TOOL_CALLS]"
     '[{"name": "sky", "arguments": {"city": "Oslo"}, "id": "call00000"}]</s>»'
     "[TOOL_RESULTS]call00000[TOOL_CONTENT]rain[/TOOL_RESULTS]«Rain.</s>»"),
    ("gemma-2", "system", [SYSTEM, *TURNS], False, "<bos>" + GEMMA_TURNS % "Be brief.\n\n"),
    ("gemma-2", "turns", TURNS, False, "<bos>" + GEMMA_TURNS % ""),
    ("gemma-2", "tools", CALLING, True, GEMMA_TOOLS),
    ("gemma-3", "system", [SYSTEM, *TURNS], False, "<bos>" + GEMMA_TURNS % "Be brief.\n\n"),
    ("gemma-3", "turns", TURNS, False, "<bos>" + GEMMA_TURNS % ""),
    ("gemma-3", "tools", CALLING, True, GEMMA_TOOLS),
    ("phi-4", "system", [SYSTEM, *TURNS], False, phi("system", "Be brief.") + plain_turns(phi)),
    ("phi-4", "turns", TURNS, False, plain_turns(phi)),
    ("phi-4", "tools", CALLING, True, as_text(phi, "", "user")),
    ("qwen-2.5", "system", [SYSTEM, *TURNS], False, im("system", "Be brief.") + "\n" + CHATML_TURNS),
    ("qwen-2.5", "turns", TURNS, False,
     im("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") + "\n" + CHATML_TURNS),
    ("qwen-2.5", "tools", [SYSTEM, *CALLING], True,
     "<|im_start|>system\nBe brief.\n\n" + QWEN_TOOLS + im("user", "Oslo?") + "\n"
     + trained(im, "assistant", CALL) + "\n" + im("user", RESULT) + "\n" + trained(im, "assistant", "Rain.") + "\n"),
    ("qwen-3", "system", [SYSTEM, *TURNS], False,
     im("system", "Be brief.") + "\n" + CHATML_TURNS.replace("«Ciao", "«<think>\n\n</think>\n\nCiao")),
    ("qwen-3", "turns", TURNS, False, CHATML_TURNS.replace("«Ciao", "«<think>\n\n</think>\n\nCiao")),
    ("qwen-3", "tools", CALLING, True,
     "<|im_start|>system\n" + QWEN_TOOLS + im("user", "Oslo?") + "\n" + trained(im, "assistant", CALL) + "\n"
     + im("user", RESULT) + "\n" + trained(im, "assistant", "<think>\n\n</think>\n\nRain.") + "\n"),
    ("qwen-3", "thinking", THINKING, False,
     CHATML_TURNS.replace("«Ciao", "«<think>\nPart.\n</think>\n\nCiao")),
    ("deepseek-r1", "system", [SYSTEM, *TURNS[:2]], False,
     f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜><think>\n«\n</think>\n\nHello!{EOS}»"),
    ("deepseek-r1", "turns", TURNS, False,
     f"{BOS}<｜User｜>Hi<｜Assistant｜>Hello!{EOS}<｜User｜>Bye<｜Assistant｜><think>\n«\n</think>\n\nCiao!{EOS}»"),
    ("deepseek-r1", "thinking", THINKING, False,
     f"{BOS}<｜User｜>Hi<｜Assistant｜>Hello!{EOS}<｜User｜>Bye<｜Assistant｜><think>\n«Part.\n</think>\n\nCiao!{EOS}»"),
    ("deepseek-r1", "tools", CALLING[:2], True,
     f"{BOS}{HERMES}<｜User｜>Oslo?<｜Assistant｜><think>\n«\n</think>\n\n{CALL}{EOS}»"),
    ("gpt-oss", "system", [SYSTEM, *TURNS], False,
     HARMONY + "<|end|><|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user<|message|>Hi<|end|>"
     "<|start|>assistant«<|channel|>final<|message|>Hello!»<|end|><|start|>user<|message|>Bye<|end|>"
     "<|start|>assistant«<|channel|>final<|message|>Ciao!<|return|>»"),
    ("gpt-oss", "thinking", THINKING, False,
     HARMONY + "<|end|><|start|>user<|message|>Hi<|end|>"
     "<|start|>assistant«<|channel|>final<|message|>Hello!»<|end|><|start|>user<|message|>Bye<|end|>"
     "<|start|>assistant«<|channel|>analysis<|message|>Part.<|end|>"
     "<|start|>assistant<|channel|>final<|message|>Ciao!<|return|>»"),
    ("gpt-oss", "tools", CALLING, True,
     HARMONY + "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
     "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// the weather\n"
     "type sky = (_: {\n// a city\ncity: string,\ndays?: number,\n}) => any;\n\n} // namespace functions<|end|>"
     "<|start|>user<|message|>Oslo?<|end|>"
     '<|start|>assistant« to=functions.sky<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>»'
     "<|start|>functions.sky to=assistant<|channel|>commentary<|message|>rain<|end|>"
     "<|start|>assistant«<|channel|>final<|message|>Rain.<|return|>»"),
]  # fmt: skip


def renderer_of(name: str, **options: Any) -> Renderer:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].control)})
    return Renderer(tokenizer, TEMPLATES[name].text, **options)


@pytest.mark.parametrize(
    ("name", "messages", "tools", "expected"),
    [(name, messages, tools, expected) for name, _, messages, tools, expected in GOLDEN],
    ids=[f"{name} {what}" for name, what, *_ in GOLDEN],
)
def test_text_tokens_and_mask(name: str, messages: list[dict[str, Any]], tools: bool, expected: str) -> None:
    # DeepSeek-R1 opens a thinking block that answers before the last question do not have
    renderer = renderer_of(name, prefix_mismatch="context" if name == "deepseek-r1" else "refuse")
    row = renderer.render(Conversation(messages, [TOOL] if tools else None))
    marked, done = "", 0
    for start, end in row.spans:
        marked += row.text[done:start] + "«" + row.text[start:end] + "»"
        done = end
    assert marked + row.text[done:] == expected
    (encoded,) = renderer.encode([row])
    assert encoded.problem is None
    decode = renderer.tokenizer.decode
    assert decode(encoded.ids) == row.text
    assert decode(encoded.ids[encoded.trained]) == "".join(re.findall("«(.*?)»", expected, re.DOTALL))
    control = set(renderer.tokenizer.convert_tokens_to_ids(list(TEMPLATES[name].control)))
    strings = "|".join(map(re.escape, TEMPLATES[name].control))
    assert sum(int(token) in control for token in encoded.ids) == len(re.findall(strings, row.text))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_of_the_table_is_covered_and_is_named_rightly(name: str) -> None:
    assert {what for row, what, *_ in GOLDEN if row == name} >= {"system", "tools"}
    template = TEMPLATES[name]
    assert template.name == name
    assert all(token in template.text for token in template.control)
    can = renderer_of(name)._can
    assert ("system" in template.supports) == can.system
    assert ("tools" in template.supports) == (can.tools and can.calls != "none")
    assert ("thinking" in template.supports) == (can.reasoning is not None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_a_server_is_a_prefix_of_the_tokens(name: str) -> None:
    renderer = renderer_of(name, train_on="last")
    row = renderer.render(Conversation(TURNS))
    (encoded,) = renderer.encode([row])
    prompt = renderer.tokenizer(renderer.prompt(TURNS[:3]), add_special_tokens=False)["input_ids"]
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.trained[len(prompt)]
    assert not encoded.trained[: len(prompt)].any()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_writes_the_same_with_the_template_that_is_saved(name: str, prompt: bool) -> None:
    renderer = renderer_of(name)
    renderer.tokenizer.chat_template = TEMPLATES[name].text.replace("strftime_now(", "'01 Jan 2025' or (")
    talk = TURNS if name == "gemma-2" else [SYSTEM, *TURNS]
    ours = ChatTemplate(renderer.tokenizer.chat_template).render(
        talk, tools=[TOOL], variables=renderer.tokenizer.special_tokens_map, add_generation_prompt=prompt
    )
    assert ours.text == renderer.tokenizer.apply_chat_template(
        talk, tools=[TOOL], tokenize=False, add_generation_prompt=prompt
    )


def test_earlier_thinking_and_ends_are_noted() -> None:
    assert NOTE_THINKING in renderer_of("qwen-3").render(Conversation(THINKING)).notes
    assert NOTE_THINKING not in renderer_of("qwen-3").render(Conversation(THINKING[2:])).notes
    assert NOTE_END in renderer_of("gpt-oss").render(Conversation(TURNS)).notes
    assert NOTE_END not in renderer_of("llama-3").render(Conversation(TURNS)).notes
    assert NOTE_DATE in renderer_of("llama-3").render(Conversation(TURNS)).notes


def test_turns_that_the_server_asks_for_otherwise_are_refused() -> None:
    with pytest.raises(RowProblem, match=r"prompt is not a prefix: message 1: token \d+ is 'H', in .*'<'"):
        renderer_of("deepseek-r1").render(Conversation(TURNS))
    with pytest.raises(
        RowProblem, match="prompt is not a prefix: message 1"
    ):  # tools move to the last question
        renderer_of("mistral").render(Conversation([*TURNS[:2], *CALLING], [TOOL]))


def test_parallel_calls_are_refused_where_the_format_has_none() -> None:
    twice = [CALLING[0], {**CALLING[1], "tool_calls": CALLING[1]["tool_calls"] * 2}]
    with pytest.raises(RowProblem, match="one tool call a turn"):
        renderer_of("llama-3").render(Conversation(twice, [TOOL]))
    text = renderer_of("qwen-2.5").render(Conversation(twice, [TOOL])).text
    assert f"{CALL}\n{CALL}<|im_end|>" in text


def test_missing_control_tokens_are_noted() -> None:
    assert missing_control(TEMPLATES["phi-4"].text, ["<|im_start|>", "<|im_end|>"]) == ("<|im_sep|>",)
    assert missing_control("{{ 1 }}", []) == ()
    (note,) = Renderer(tiny_tokenizer(), TEMPLATES["phi-4"].text).render(Conversation(TURNS)).notes
    assert "lacks" in note
    assert "<|im_sep|>" in note
    assert NOTE_CHATML not in Renderer(tiny_tokenizer(), TEMPLATES["chatml"].text)._notes


def test_names_are_settings() -> None:
    for name, template in TEMPLATES.items():
        assert resolve_template(name, tiny_tokenizer()) == template.text
