"""The demo on a tiny random encoder and a tiny data set: no network, no pretrained weights."""

# ruff: noqa: E402 (imports follow the check for optional libraries)

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterator

import pytest
import torch

for _library in ("transformers", "peft", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(_library, reason=f"the demo needs {_library}: pip install -e '.[demo]'")

from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from examples.demo import METHODS, data, report
from examples.demo.__main__ import main
from examples.demo.models import build_classifier, model_source
from examples.demo.packages import InputError
from examples.demo.training import step_memory

_WORDS = ("[PAD]", "[UNK]", "a", "the", "film", "is", "was", "good", "great", "bad", "awful", "very")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a random two-layer BERT and a tokenizer of a dozen words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(_WORDS), max_position_embeddings=16, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    """A csv file of 160 distinct little reviews whose adjective gives the label."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    labels = {"good": "positive", "great": "positive", "bad": "negative", "awful": "negative"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "text"])
        for adjective, label in labels.items():
            for length in range(10):
                for start in ("a film", "the film", "film", "the very film"):
                    text = f"{start} is {adjective} {'very ' * (length % 5)}{'was ' * (length // 5)}".strip()
                    writer.writerow([label, text])
    return str(path)


# --- the whole demo -----------------------------------------------------------------------------------------


def test_demo_runs_end_to_end(model, reviews, device, tmp_path, capsys) -> None:
    output = tmp_path / "output"
    options = ["--model", model, "--data", reviews, "--device", device, "--output", str(output)]
    options += ["--methods", ",".join(METHODS), "--rank", "4", "--alpha", "8", "--epochs", "3"]
    assert main([*options, "--seeds", "2", "--batch-size", "8", "--learning-rate", "1e-2"]) == 0

    printed = capsys.readouterr().out
    for label in ("head only", "LoRA", "DoRA", "BoRA", "full", "ms/step", "peak MiB", "± over seeds"):
        assert label in printed
    kept = {name: int(labels) for name, labels in re.findall(r"  (.+): +(\d+) of 32 labels as trained", printed)}
    assert list(kept) == ["reloaded", "merged", "as LoRA, rank 16", "as LoRA, rank 64"], printed
    assert kept.pop("as LoRA, rank 16") >= 24 and set(kept.values()) == {32}, printed  # 64 is all that layers have
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((output / "results.json").read_text())
    assert results["checks"]["reloaded"] == {"examples": 32, "same_labels": 32, "max_logit_difference": 0.0}
    methods = {result["method"]: result for result in results["methods"]}
    assert tuple(methods) == METHODS
    for name in ("lora", "dora", "bora", "full"):
        assert methods[name]["accuracy"] > 0.9, name
    counts = [methods[name]["trained_parameters"] for name in METHODS]
    assert counts == sorted(counts) and counts[0] == 2 * 32 + 2
    assert methods["head"]["step_memory_bytes"] < methods["lora"]["step_memory_bytes"]

    saved = load_file(output / "bora_adapter" / "adapter_model.safetensors")
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in saved}
    magnitudes = {"lora_magnitude_vector_row", "lora_magnitude_vector_col"}
    assert kinds == {"lora_A", "lora_B", *magnitudes, "head", "bias"}  # the head's two
    assert sum(tensor.numel() for tensor in saved.values()) == methods["bora"]["trained_parameters"]


def test_methods_start_alike(model) -> None:
    classifiers = {name: build_classifier(model, name, 2, rank=4, alpha=8.0, seed=3) for name in METHODS}
    ids = torch.randint(2, len(_WORDS), (5, 7))
    with torch.no_grad():
        logits = {name: c.eval()(ids, torch.ones_like(ids)) for name, c in classifiers.items()}
    for name in METHODS:
        torch.testing.assert_close(logits[name], logits["head"], rtol=1e-5, atol=1e-5)
    lora, dora, bora = (
        [p for name, p in classifiers[method].named_parameters() if "lora_A" in name]
        for method in ("lora", "dora", "bora")
    )
    assert len(bora) == 12
    for a, b, c in zip(lora, dora, bora, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_step_memory_counts_what_is_allocated(device) -> None:
    class Widening(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(width))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.table.expand(2, -1).sum(1).expand(len(input_ids), -1)

    batch = data.collate(data.Encoded([[1], [2]], torch.tensor([0, 1]), 0), [0, 1])
    small, large = (step_memory(Widening(width).to(device), batch) for width in (1 << 16, 1 << 18))
    added = 4 * ((1 << 18) - (1 << 16))
    assert 3 * added <= large - small <= 5 * added  # a gradient and AdamW's two moments, and its scratch


def test_missing_library_is_named(monkeypatch, capsys) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    assert main(["--methods", "dora"]) == 1
    assert capsys.readouterr().err == "the demo needs peft: pip install -e '.[demo]'\n"


@pytest.mark.parametrize("arguments", [["--methods", "bora,vera"], ["--rank", "0"], ["--norm-order", "col"]])
def test_bad_arguments_are_refused(arguments, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


# --- data ---------------------------------------------------------------------------------------------------


def test_movie_lines_become_labels() -> None:
    lines = ["1\t2.25\tA 'fine' film", "2\t-0.5\ttabs\tin the text", "3\t0.0\tneither"]
    assert data.parse_movies(lines) == [("A 'fine' film", "positive"), ("tabs\tin the text", "negative")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label,more\n"good, very",1,x\nbad,0,y\n'),
        ("a.tsv", "label\ttext\n1\tgood, very\n0\tbad\n"),
        ("a.jsonl", '{"text": "good, very", "label": 1}\n\n{"label": 0, "text": "bad"}\n'),
    ],
)
def test_files_are_read(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    assert data.read_rows(tmp_path / name) == [("good, very", "1"), ("bad", "0")]
    assert data.load_dataset(str(tmp_path / name)).classes == ("0", "1")


def test_model_is_a_folder_or_a_hub_id(tmp_path) -> None:
    for name in (str(tmp_path), "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"):
        assert model_source(name) == name
    for name in ("/no/such/folder", "./no-such-folder", "~/model", "models/no/such"):
        with pytest.raises(InputError, match=f"--model must be a folder or a hub id, got {name}, which is no folder"):
            model_source(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\ngood,1\n", "example 1 must have text and label"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", "text,label\ngood,1\nbetter,1\n", "at least two labels, got 1"),
        ("a.jsonl", "{text}\n", "one JSON object on each line"),
        ("a.txt", "good\t1\n", "must end in .csv, .tsv, .jsonl"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        data.load_dataset(str(tmp_path / name))


def test_data_that_is_not_there_is_named(tmp_path) -> None:
    for source in (str(tmp_path / "nope.csv"), "nope.jsonl", "stanfordnlp/imdb"):
        with pytest.raises(InputError, match=f"--data must be a file or a folder, got {source}, which is neither"):
            data.load_dataset(source)


def test_folder_with_a_test_file(tmp_path) -> None:
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}")
    (tmp_path / "test.jsonl").write_text('{"text": "text 3", "label": 1}\n{"text": "new", "label": 0}\n')
    splits = data.split(data.load_dataset(str(tmp_path)), 100, 100, 100)
    assert sorted(splits.test) == [("new", 0), ("text 3", 1)]
    texts = [text for text, _ in splits.train + splits.validation]
    assert len(texts) == 11 + 3 and "text 3" not in texts  # three and one fifths of the 19 that are left


def test_splits_are_disjoint_and_fixed() -> None:
    dataset = data.Dataset(("0", "1"), [(f"text {i}", i % 2) for i in range(1000)], None)
    splits = data.split(dataset, 300, 200, 400)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [300, 200, 400]
    assert len({text for part in parts for text, _ in part}) == 900
    assert splits == data.split(dataset, 300, 200, 400)


def test_training_batches_hold_every_example_once_in_the_same_order_for_a_seed() -> None:
    ids = [[7] * (1 + i * 5 % 17) for i in range(100)]
    encoded = data.Encoded(ids, torch.arange(100) % 2, pad_id=0)
    first, again, other = (
        list(data.training_batches(encoded, 8, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    order = torch.cat([batch.indices for batch in first])
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, torch.cat([batch.indices for batch in again]))
    assert not torch.equal(order, torch.cat([batch.indices for batch in other]))
    for batch in first:
        assert torch.equal(batch.labels, batch.indices % 2)
        assert batch.attention_mask.sum(1).tolist() == [len(ids[i]) for i in batch.indices]
        assert torch.equal(batch.input_ids, 7 * batch.attention_mask)


# --- report -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "examples", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval_against_known_values(correct, examples, low, high) -> None:
    assert report.wilson_interval(correct / examples, examples) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference() -> None:
    first, second = [[True, True, False, True]], [[True, False, False, True]]
    difference, half = report.paired_difference(first, second)
    assert difference == 0.25
    assert half == pytest.approx(1.95996 * 0.5 / 2, rel=1e-4)  # the differences 0, 1, 0, 0 have the deviation ½


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert report.smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert report.smooth([1.0, 0.0]) == pytest.approx([1.0, 0.9 / 1.9])
