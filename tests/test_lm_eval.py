"""lm-evaluation-harness with a model of ours, beside its own `hf` (Transformers): equal numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from tiny import save_tiny

lm_eval = pytest.importorskip("lm_eval", reason="`make nightly` installs lm-evaluation-harness")
# The harness and the libraries it comes with say much that is no matter of ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.nightly]

QUESTIONS = [
    ("What is the capital of France?", ["Paris", "London", "Rome", "a cheese"], 0),
    ("Which animal barks?", ["a cat", "a dog", "a fish"], 1),
    ("What colour is the sky on a clear day?", ["green", "blue", "red", "black"], 1),
    ("How many legs has a spider?", ["six", "two", "eight", "one hundred"], 2),
    ("What do bees make?", ["honey", "milk", "steel"], 0),
    ("What is 2 + 2?", ["3", "4", "5", "22"], 1),
    ("Which planet do we live on?", ["Mars", "Venus", "Earth", "the Moon"], 2),
    ("What is frozen water called?", ["steam", "ice", "sand"], 1),
    ("Who wrote Hamlet?", ["William Shakespeare", "Isaac Newton"], 0),
    ("What is the opposite of hot?", ["cold", "warm", "tall", "the temperature of boiling oil"], 0),
]
TEXTS = [
    "Once upon a time there was a little girl who lived near the forest. She had a red hat.",
    "Water boils at 100 degrees. Ice melts at 0 degrees.\n\nSo much for water.",
    "A longer text, which is read in several windows. " * 20,
]
CHOICES = """
task: flm_choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: flm_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: flm_writing
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "Question"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {"flm_choices": CHOICES, "flm_rolling": ROLLING, "flm_writing": WRITING}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    questions = [dict(zip(("question", "choices", "answer"), q, strict=True)) for q in QUESTIONS]
    texts = [{"text": text} for text in TEXTS]
    records: dict[str, list[Any]] = {
        "flm_choices": questions,
        "flm_rolling": texts,
        "flm_writing": questions[:4],
    }
    for name, text in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in records[name]))
        (folder / f"{name}.yaml").write_text(text % data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, tasks: Any, **settings: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, **settings
    )


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """Returns what the model said to each request, in the order of the documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["resps"]]


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("acc,none", "acc_norm,none"):
        assert ours["results"]["flm_choices"][name] == theirs["results"]["flm_choices"][name]
    mine, expected = (answers(results, "flm_choices") for results in (ours, theirs))
    assert len(mine) == sum(len(choices) for _, choices, _ in QUESTIONS)
    logs, expected_logs = (np.array([x[0] for x in y], "float64") for y in (mine, expected))
    np.testing.assert_allclose(logs, expected_logs, atol=1e-3, rtol=0)
    assert [bool(x[1]) for x in mine] == [bool(x[1]) for x in expected]
    mine, expected = (answers(results, "flm_rolling") for results in (ours, theirs))
    np.testing.assert_allclose(np.array(mine), np.array(expected), atol=0, rtol=5e-5)
    for name in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        perplexities = [results["results"]["flm_rolling"][name] for results in (ours, theirs)]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert answers(ours, "flm_writing") == answers(theirs, "flm_writing")


def transformers_model(model: Any, tokenizer: Any, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=4, **settings)


@pytest.mark.parametrize(("add_bos", "chat"), [(False, True), (True, False)])
def test_a_tiny_model_has_the_numbers_of_transformers(
    tasks: Any, tmp_path: Path, add_bos: bool, chat: bool
) -> None:
    import transformers

    from functional_llm.evaluation.lm_eval import FunctionalLM

    folder = save_tiny(tmp_path / "tiny")
    if add_bos:
        _write_bos(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = transformers_model(model, tokenizer, max_length=96)
    ours = FunctionalLM(folder, batch_size=4, max_length=96)
    assert (ours.tok_encode("abc")[0] == tokenizer.bos_token_id) == add_bos
    settings = {"apply_chat_template": chat}
    expected = evaluate(theirs, tasks, **settings)
    check_equal(evaluate(ours, tasks, **settings), expected)
    if not chat:  # by its name, as on the harness's command line
        arguments = f"pretrained={folder},max_length=96"
        by_name = {"model_args": arguments, "batch_size": "auto", "device": "cpu"}
        check_equal(evaluate("functional_llm", tasks, **by_name), expected)


def _write_bos(folder: Path) -> None:
    """Makes a saved tokenizer put a BOS first, as Llama's does."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content))


@pytest.mark.real
def test_smollm2_has_the_numbers_of_transformers(
    tasks: Any, smollm2_gguf: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    from functional_llm.evaluation.lm_eval import FunctionalLM
    from functional_llm.tokenizers import save_tokenizer

    generator = flm.TextGenerator(
        flm.Backbone.from_preset(smollm2_gguf), flm.Tokenizer.from_preset(smollm2_gguf)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    # The tokenizer that Transformers makes of the file does not cut digits as the model's does.
    assert generator.tokenizer is not None
    save_tokenizer(generator.tokenizer, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = evaluate(transformers_model(model, tokenizer, max_length=256), tasks)
    ours = evaluate(FunctionalLM(generator, max_length=256), tasks)
    check_equal(ours, theirs)
    assert ours["results"]["flm_choices"]["acc,none"] >= 0.6
