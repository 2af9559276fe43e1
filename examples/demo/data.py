"""Labelled texts: reading them, splitting them and making batches of token ids."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .packages import MOVIES, InputError, fetch

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_SPLIT_SEED = 20241209  # the split is the same in every run, whatever the seeds of training
_BUCKET = 8  # batches are cut from this many batches' worth of examples sorted by length


@dataclass(frozen=True)
class Dataset:
    """Texts with the index of their class; ``test`` is None for data that has no test set of its own."""

    classes: tuple[str, ...]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]] | None


@dataclass(frozen=True)
class Splits:
    """What is trained on, what choices are made on, and what is reported; no text is in two of them."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of each text, without padding, and the labels [examples]."""

    ids: list[list[int]]
    labels: Tensor
    pad_id: int


@dataclass(frozen=True)
class Batch:
    """Padded token ids and their mask [batch, length], labels and the examples' places in the data."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    indices: Tensor


# --- reading ------------------------------------------------------------------------------------------------


def load_movies(cache_dir: Path) -> Dataset:
    """Movie snippets, negative or positive by the sign of their mean rating, which runs from -4 to 4."""
    lines = (fetch(MOVIES, cache_dir) / MOVIES.files[0]).read_text(encoding="utf-8").splitlines()
    return _dataset(parse_movies(lines), None)


def parse_movies(lines: list[str]) -> list[tuple[str, str]]:
    """(text, label) of lines "number<tab>mean rating<tab>text"; a text rated 0 is of neither class."""
    rows = [line.split("\t", 2) for line in lines]
    return [(text, "positive" if float(rating) > 0 else "negative") for _, rating, text in rows if float(rating) != 0]


def load_dataset(source: str) -> Dataset:
    """Texts from a file, or from a folder with ``train`` and perhaps ``test`` files.

    Files are csv or tsv with the columns text and label, or jsonl with these keys; more columns do no harm.
    Raises InputError that says what is missing.
    """
    path = Path(source)
    if path.is_file():
        return _dataset(read_rows(path), None)
    if path.is_dir():
        train, test = (_find(path, name) for name in ("train", "test"))
        if train is None:
            raise InputError(f"{path} must hold train.csv, train.tsv or train.jsonl")
        return _dataset(read_rows(train), None if test is None else read_rows(test))
    raise InputError(f"--data must be a file or a folder, got {source}, which is neither")


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(text, label) of each row of a csv, tsv or jsonl file."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            try:
                rows = [json.loads(line) for line in file if line.strip()]
            except json.JSONDecodeError as error:
                raise InputError(f"{path} must hold one JSON object on each line: {error}") from error
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        elif path.suffix == ".tsv":
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            raise InputError(f"{path} must end in {', '.join(_SUFFIXES)}")
    if not rows:
        raise InputError(f"{path} holds no examples")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or row.get("text") is None or row.get("label") is None:
            raise InputError(f"{path}: example {number} must have text and label, got {row}")
    return [(str(row["text"]), str(row["label"])) for row in rows]


def _find(folder: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def _dataset(train: list[tuple[str, str]], test: list[tuple[str, str]] | None) -> Dataset:
    """Labels become indices, and a text that comes twice is kept once: never in training and test both."""
    classes = tuple(sorted({label for _, label in train}))
    if len(classes) < 2:
        raise InputError(f"the data must have at least two labels, got {', '.join(classes)}")
    unknown = {label for _, label in test or ()} - set(classes)
    if unknown:
        raise InputError(f"the test data has labels that the training data lacks: {', '.join(sorted(unknown))}")
    test_texts = {text: classes.index(label) for text, label in test or ()}
    train_texts = {text: classes.index(label) for text, label in train if text not in test_texts}
    return Dataset(classes, list(train_texts.items()), None if test is None else list(test_texts.items()))


# --- splitting ----------------------------------------------------------------------------------------------


def split(dataset: Dataset, train_size: int, validation_size: int, test_size: int) -> Splits:
    """Random disjoint parts. Small data give at most three fifths to training and a fifth to validation."""
    pool = _shuffled(dataset.train)
    train_size = min(train_size, len(pool) * 3 // 5)
    validation_size = min(validation_size, len(pool) // 5)
    rest = pool[train_size + validation_size :] if dataset.test is None else _shuffled(dataset.test)
    if not train_size or not validation_size or not rest:
        raise InputError(f"the data must have at least 5 examples, got {len(pool)}")
    return Splits(pool[:train_size], pool[train_size : train_size + validation_size], rest[:test_size])


def _shuffled(examples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return [examples[i] for i in order.tolist()]


# --- batches ------------------------------------------------------------------------------------------------


def encode(examples: list[tuple[str, int]], tokenizer, max_length: int) -> Encoded:
    """Token ids, cut to ``max_length``."""
    texts = [text for text, _ in examples]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Encoded(ids, torch.tensor([label for _, label in examples]), pad_id)


def training_batches(data: Encoded, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch in random order, with texts of like length together so that little is padding."""
    order = torch.randperm(len(data.ids), generator=generator).tolist()
    bucket = _BUCKET * batch_size
    by_length = [
        index
        for start in range(0, len(order), bucket)
        for index in sorted(order[start : start + bucket], key=lambda i: len(data.ids[i]))
    ]
    chunks = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    for place in torch.randperm(len(chunks), generator=generator).tolist():
        yield collate(data, chunks[place])


def evaluation_batches(data: Encoded, batch_size: int) -> Iterator[Batch]:
    """All examples once, by length."""
    order = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))
    for start in range(0, len(order), batch_size):
        yield collate(data, order[start : start + batch_size])


def longest_batch(data: Encoded, batch_size: int) -> Batch:
    """The batch that needs the most memory."""
    return collate(data, sorted(range(len(data.ids)), key=lambda i: -len(data.ids[i]))[:batch_size])


def collate(data: Encoded, indices: list[int]) -> Batch:
    """A batch of these examples, padded at the end to the longest of them."""
    length = max(len(data.ids[i]) for i in indices)
    input_ids = torch.full((len(indices), length), data.pad_id)
    attention_mask = torch.zeros((len(indices), length), dtype=torch.long)
    for row, i in enumerate(indices):
        input_ids[row, : len(data.ids[i])] = torch.tensor(data.ids[i])
        attention_mask[row, : len(data.ids[i])] = 1
    return Batch(input_ids, attention_mask, data.labels[indices], torch.tensor(indices))
