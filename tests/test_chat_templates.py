"""Chat templates with all that Transformers gives them, and which tokens of a chat are learnt."""

import copy
import dataclasses
import json
import pickle
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from functional_llm.presets.tokenizer import Tokenizer
from functional_llm.tokenizers import TextTokenizer
from functional_llm.tokenizers.chat_template import ChatTemplate
from functional_llm.tokenizers.tool_schemas import tool_schemas
from functional_llm.training import Record, make_examples
from tiny import TEMPLATE, save_tokenizer

transformers = pytest.importorskip("transformers")

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One 🙂?"},
    {"role": "assistant", "content": "Yes, one.", "reasoning_content": "Easy."},
    {"role": "user", "content": "Two? <|im_end|>"},
    {"role": "assistant", "content": " 日本 two. ", "reasoning_content": "Hard."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking is written in the last answer only, as Qwen3's template does.
ANSWER = (
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% endif %}{{ m['content'] }}<|im_end|>"
)
THINKS_LAST = MARKED.replace("{{ m['content'] }}<|im_end|>{% endgen", f"{ANSWER}{{% endgen")
UNMARKED = THINKS_LAST.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# A generation prompt that ends in "<think>", as DeepSeek R1's does.
R1 = MARKED.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
TOOLS = TEMPLATE.replace(
    "{% for m in",
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    facts |= {"unk_token": "<unk>", "image_token": "<image>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_directory(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def _with(ours: TextTokenizer, template: Any) -> TextTokenizer:
    return dataclasses.replace(ours, chat_template=template)


def multiply(x: float, y: int | None, mode: Literal["fast", "slow"] = "fast") -> list[float]:
    """
    Multiplies numbers,
    quickly.

    Args:
        x: The first number, which
            is any.
        y: The second: a whole one
        mode: How. (choices: ["fast", "slow"])

    Returns:
        The product.
    """
    return [x * (y or 0)]


class Colour(Enum):
    RED = "red"
    BLUE = 2


class Painter:
    def paint(self, colour: Colour, where: dict[str, list[int]], what: tuple[int, str], how: list):
        """Paints.

        Args:
            colour: One.
            where: The place.
            what: The thing.
            how: The way.
        """


def union(a: int | str, b: list[int] | str | None, c: Any, d: dict) -> dict[str, object]:
    """Takes all.

    Args:
        a: One.
        b: Two.
        c: Three.
        d: Four.
    """
    return {}


def test_functions_become_the_schemas_of_transformers() -> None:
    for tool in (multiply, Painter().paint, Painter.paint, union):
        assert json.dumps(tool_schemas([tool])) == json.dumps(
            [transformers.utils.get_json_schema(tool)]
        )


def _bare(x: int) -> None:
    pass


def _undescribed(x: int) -> None:
    """Has no Args."""


def _unhinted(x) -> None:
    """Has no hint.

    Args:
        x: Something.
    """


def _odd(x: Path) -> None:
    """Has an odd type.

    Args:
        x: Something.
    """


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (_bare, "_bare cannot be written as a tool. Expected: a docstring"),
        (_undescribed, "a description of every argument. Received: no description of 'x'"),
        (_unhinted, "an annotation of every argument. Received: none of 'x'"),
        (_odd, "annotations of int, float.*Path"),
        (print, "neither a function nor plain data"),
    ],
)
def test_functions_that_are_no_tools(tool: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool_schemas([tool])


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (TEMPLATE, {"continue_final_message": True}),
        (
            TEMPLATE.replace("m['content'] }}", "m['content'] | trim }}"),
            {"continue_final_message": True},
        ),
        (THINKS_LAST, {"continue_final_message": "reasoning_content"}),
        (MARKED, {"continue_final_message": True}),
        (TOOLS, {"tools": [multiply, {"type": "function", "function": {"name": "é"}}]}),
        ("{{ documents[0].title }}{{ x }}", {"documents": [{"title": "t", "text": "x"}], "x": 3}),
        ("{{ pad_token }}{{ unk_token }}{{ image_token }}{{ bos_token }}{{ eos_token }}", {}),
        ("{{ sep_token is defined }}{{ messages[0].tool_calls is defined }}", {}),
    ],
)
def test_what_a_template_is_given(
    ours: TextTokenizer, theirs: Any, template: str, options: dict[str, Any]
) -> None:
    messages = [{**message, "tool_calls": None} for message in MESSAGES]  # as `datasets` gives them
    given = {"add_generation_prompt": False, "chat_template": template, **options}
    expected = theirs.apply_chat_template(messages, tokenize=False, **given)
    assert ours.apply_chat_template(messages, **given) == expected
    ids = theirs.apply_chat_template(messages, return_dict=False, **given)
    received = ours.apply_chat_template(messages, tokenize=True, **given)
    assert received == ids == theirs(expected, add_special_tokens=False).input_ids


def test_parts_of_a_message_and_messages_of_other_libraries(
    ours: TextTokenizer, theirs: Any
) -> None:
    template = "{% for m in messages %}{{ m.content[0].text }}|{{ m.role }}\n{% endfor %}"

    @dataclasses.dataclass
    class Message:
        role: str
        content: Any

    messages = [Message("user", [{"type": "text", "text": "a"}])] * 2
    options: dict[str, Any] = {"chat_template": template, "continue_final_message": True}
    plain = [dataclasses.asdict(message) for message in messages]
    expected = theirs.apply_chat_template(plain, tokenize=False, **options)
    assert ours.apply_chat_template(messages, **options) == expected == "a|user\na"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"return_tensors": "pt"},
            "does not know 'return_tensors'. Expected: one of its variables",
        ),
        ({"enable_thinking": False, "x": 1}, "does not know 'enable_thinking', 'x'"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "either .*Received: both",
        ),
        ({"continue_final_message": "thinking"}, "a text under 'thinking'"),
        ({"continue_final_message": True, "chat_template": "{{ 1 }}"}, "leaves out 'c'"),
        ({"chat_template": "rag"}, r"no such chat template.*the templates \['default'\]"),
        ({"chat_template": "{% if %}"}, "not a valid Jinja template"),
        ({"documents": ["a"]}, "`documents` as a list of dicts"),
        ({"tools": {"name": "f"}}, "a list of tools"),
    ],
)
def test_arguments_that_nobody_knows(
    ours: TextTokenizer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours.apply_chat_template([{"role": "assistant", "content": "c"}], **options)


@pytest.mark.parametrize("layout", ["list", "files"])
def test_templates_with_names(tmp_path: Path, layout: str) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    facts = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    templates = {"default": "default", "tool_use": "tools {{ tools | length }}", "rag": "rag"}
    del facts["chat_template"]
    if layout == "list":
        facts["chat_template"] = [{"name": k, "template": x} for k, x in templates.items()]
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(templates["default"])
        for name in ("tool_use", "rag"):
            (tmp_path / f"additional_chat_templates/{name}.jinja").write_text(templates[name])
    path.write_text(json.dumps(facts))
    ours = TextTokenizer.from_directory(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    given: list[dict[str, Any]] = [
        {},
        {"tools": [multiply]},
        {"chat_template": "rag"},
        {"tools": []},
    ]
    for options in given:
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert ours.apply_chat_template(MESSAGES, **options) == expected
    without = _with(ours, {"rag": "rag"})
    with pytest.raises(ValueError, match=r"one named default, or .*the templates \['rag'\]"):
        without.apply_chat_template(MESSAGES)


def _example(tokenizer: TextTokenizer, **fields: Any) -> tuple[list[int], np.ndarray]:
    example = make_examples([Record("here", fields)], tokenizer, 5000).items[0]
    return example.token_ids.tolist(), example.is_target


def _learnt(tokenizer: TextTokenizer, **fields: Any) -> str:
    ids, is_target = _example(tokenizer, **fields)
    return tokenizer.decode(np.array(ids)[is_target], skip_special_tokens=False)


@pytest.mark.parametrize("template", [MARKED, THINKS_LAST, R1])
def test_marks_are_learnt_as_in_transformers(
    ours: TextTokenizer, theirs: Any, template: str
) -> None:
    encoded = theirs.apply_chat_template(
        MESSAGES, chat_template=template, return_assistant_tokens_mask=True
    )
    without_bos = dataclasses.replace(_with(ours, template), add_bos=False)
    ids, is_target = _example(without_bos, messages=MESSAGES)
    assert ids == encoded["input_ids"]
    assert is_target.astype(int).tolist() == encoded["assistant_masks"]
    assert sum(is_target) > 10
    with_bos = dataclasses.replace(without_bos, add_bos=True)
    more, shifted = _example(with_bos, messages=MESSAGES)
    assert (more, shifted.tolist()) == ([ours.bos_token_id, *ids], [False, *is_target])


def test_marks_around_nothing(ours: TextTokenizer) -> None:
    template = MARKED.replace("<|im_end|>{% endgen", "{% endgen")
    records = [
        Record(str(i), {"messages": [MESSAGES[1], {"role": "assistant", "content": text}]})
        for i, text in enumerate(("Yes.", ""))
    ]
    examples = make_examples(records, _with(ours, template), 500)
    assert (len(examples.items), examples.num_dropped) == (1, 1)
    elsewhere = template.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'x' %}")
    with pytest.raises(ValueError, match="0: .* of which no mark stands in this conversation"):
        make_examples(records, _with(ours, elsewhere), 500)


def test_marks_inside_a_macro() -> None:
    source = (
        "{% macro answer(m) %}A: {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ answer(m) }}|{% endfor %}"
    )
    rendered = ChatTemplate(source).render_marked(MESSAGES[1:3])
    assert rendered.text == "A: One 🙂?|A: Yes, one.|"
    assert [rendered.text[a:b] for a, b in rendered.answers or []] == ["One 🙂?", "Yes, one."]


def test_answers_without_marks_are_learnt_where_they_are_certain(ours: TextTokenizer) -> None:
    tokenizer = _with(ours, UNMARKED)
    # What is written in the same way is certain.
    plain = [{k: x for k, x in m.items() if k != "reasoning_content"} for m in MESSAGES]
    assert _learnt(tokenizer, messages=plain) == "Yes, one.<|im_end|> 日本 two. <|im_end|>"
    with pytest.warns(
        UserWarning, match="Of 1 conversations only a part.*here, of message 3, the "
    ):
        learnt = _learnt(tokenizer, messages=MESSAGES)
    assert learnt == "<think>\nHard.\n</think>\n 日本 two. <|im_end|>"
    r1 = R1.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="here: .*does not show where the answer begins.*<think>"):
        _learnt(_with(ours, r1), messages=MESSAGES[:3])


def test_an_end_of_the_conversation_changes_no_answer(ours: TextTokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>"
        "{{ '' if loop.last else '\n' }}{% endfor %}"
        "{{ '\nassistant: ' if add_generation_prompt }}"
    )
    learnt = _learnt(_with(ours, template), messages=MESSAGES)
    assert learnt == "Yes, one.<|im_end|> 日本 two. <|im_end|>"


def test_tools_of_a_record_reach_the_template(ours: TextTokenizer) -> None:
    tokenizer = _with(ours, {"default": TEMPLATE, "tool_use": TOOLS})
    schema = tool_schemas([multiply])
    given: list[Any] = [schema, json.dumps(schema)]
    for tools in given:
        ids, _ = _example(tokenizer, messages=MESSAGES[1:3], tools=tools)
        expected = tokenizer.apply_chat_template(MESSAGES[1:3], False, tokenize=True, tools=schema)
        assert ids == expected
    given = [None, [], ""]
    for tools in given:
        ids, _ = _example(tokenizer, messages=MESSAGES[1:3], tools=tools)
        assert ids == tokenizer.apply_chat_template(MESSAGES[1:3], False, tokenize=True)
    with pytest.raises(ValueError, match="here: expected `tools` to be a list"):
        _example(tokenizer, messages=MESSAGES[1:3], tools="{")
    with pytest.raises(ValueError, match="with other keys than add_generation_prompt"):
        _example(tokenizer, messages=MESSAGES, chat_template_kwargs={"add_generation_prompt": 1})
    with pytest.raises(ValueError, match="here: The chat template does not know 'thinks'"):
        _example(tokenizer, messages=MESSAGES[1:3], chat_template_kwargs={"thinks": True})


def test_columns_of_other_libraries(ours: TextTokenizer) -> None:
    for template in (TEMPLATE, MARKED):
        tokenizer = _with(ours, template)
        expected = _example(tokenizer, messages=MESSAGES)
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        for pairs in (MESSAGES, MESSAGES[1:]):
            shared = [
                {"from": names[m["role"]], "value": m["content"], "role": None} for m in pairs
            ]
            system = {} if pairs is MESSAGES else {"system": MESSAGES[0]["content"]}
            ids, is_target = _example(tokenizer, conversations=shared, **system)
            assert ids == expected[0] and (is_target == expected[1]).all()
        # TRL learns the completion only.
        ids, is_target = _example(tokenizer, prompt=MESSAGES[:4], completion=MESSAGES[4:])
        assert ids == expected[0]
        learnt = tokenizer.decode(np.array(ids)[is_target], skip_special_tokens=False)
        assert learnt == " 日本 two. <|im_end|>"
    with pytest.raises(ValueError, match="here: expected `completion` to be a list"):
        _example(tokenizer, prompt=MESSAGES[:2], completion=MESSAGES[3:4])
    with pytest.raises(ValueError, match="here: expected `conversations` to be a list"):
        _example(tokenizer, conversations=[{"from": "human", "value": "a"}])


def test_a_rendered_chat_is_text_with_special_tokens(ours: TextTokenizer) -> None:
    text = ours.apply_chat_template(MESSAGES, add_generation_prompt=False)
    ids, is_target = _example(ours, text=text)
    assert ids == ours.apply_chat_template(MESSAGES, False, tokenize=True)  # one BOS, no other end
    assert ids.count(0) == 1 and is_target[1:].all()
    with_bos = dataclasses.replace(ours, add_bos=True)
    assert _example(with_bos, text=text)[0] == ids
    ids, _ = _example(with_bos, text="fox")
    assert ids == [ours.bos_token_id, *ours.encode("fox"), ours.eos_token_id]
    assert _example(with_bos, text="fox<|im_end|>")[0] == ids
    assert _example(with_bos, text="<s>fox")[0] == ids


def test_what_goes_into_pipelines_is_pickled_and_copied(ours: TextTokenizer) -> None:
    decoder = ours.stream_decoder()
    assert decoder.push(ours.encode("日")[:1]) == ""
    text = ours.apply_chat_template(MESSAGES)
    for make in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other = make(ours)
        assert other.apply_chat_template(MESSAGES) == text
        assert other.encode(text, parse_special=True) == ours.encode(text, parse_special=True)
        rest = make(decoder)
        assert rest.push(ours.encode("日")[1:]) == "日"
        assert make(ChatTemplate(MARKED)).render(MESSAGES) == ChatTemplate(MARKED).render(MESSAGES)


@pytest.mark.real
@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "q"}]},
        {"prompt": [], "completion": [{"role": "assistant", "content": "Hello!"}]},
        {"messages": [{"role": "assistant", "content": "Hello!"}]},
    ],
)
def test_an_answer_that_comes_first(fields: dict[str, Any], smollm2_gguf: Path) -> None:
    """What the template writes before it, a system prompt of its own, is not learnt."""
    tokenizer = Tokenizer.from_preset(smollm2_gguf)
    (example,) = make_examples([Record("here", fields)], tokenizer, 512).items
    learnt = example.token_ids[example.is_target]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == "Hello!<|im_end|>"
