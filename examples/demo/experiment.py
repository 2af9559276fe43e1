"""The demo from start to end: train every method, report, then save, reload and merge the BoRA classifier."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

from bora_kernels import load_adapter, merge_adapter, save_adapter, save_as_lora

from . import report
from .data import Encoded, encode, load_dataset, load_movies, longest_batch, split
from .models import TextClassifier, build_classifier, model_source, trained_parameters
from .packages import MINILM, MOVIES, fetch
from .training import predict, step_memory, train

# Each is the best of a grid on the validation split, mean of two seeds, with the default options: lora, dora
# and bora 5e-4 to 4e-3 and full 1e-4 to 4e-4 in steps of 2, head 3e-3 to 3e-2 in steps of about 3. To repeat
# it: --evaluate-on validation --seeds 2 --learning-rate ...
LEARNING_RATES = {"head": 1e-2, "lora": 2e-3, "dora": 2e-3, "bora": 2e-3, "full": 2e-4}
_VALIDATION_SIZE = 2000
_CHECKED = 500  # test examples on which the reloaded and the merged model are compared with the trained one
_LORA_RANKS = (16, 64)  # to which the adapter is cut, to show what a LoRA file of it loses
_MEMORY_MEASURE = "tensors that one step adds to the model, longest batch"


def run(options: argparse.Namespace) -> None:
    """Run the demo and print its results; files go to ``options.output``."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = model_source(options.model) if options.model else str(fetch(MINILM, options.cache_dir))
    dataset = load_movies(options.cache_dir) if options.data is None else load_dataset(options.data)
    splits = split(dataset, options.train_size, _VALIDATION_SIZE, options.test_size)
    tokenizer = AutoTokenizer.from_pretrained(model)
    train_data = encode(splits.train, tokenizer, options.max_length)
    test_data = encode(getattr(splits, options.evaluate_on), tokenizer, options.max_length)
    _describe(options, dataset.classes, train_data, test_data)

    options.output.mkdir(parents=True, exist_ok=True)
    results, bora = [], None
    for method in options.methods:
        result, classifier = _run_method(options, model, method, len(dataset.classes), train_data, test_data)
        results.append(result)
        bora = classifier if method == "bora" else bora

    print("\n" + report.format_table(results, _MEMORY_MEASURE))
    checks = {} if bora is None else _check_bora(options, model, bora, test_data)
    names = [Path(options.model or "MiniLM").name, Path(options.data or "movie sentiment").name]
    report.plot_losses(options.output / "loss_curves.png", results, title=" on ".join(names))
    report.write_json(
        options.output / "results.json",
        results,
        settings=vars(options),
        torch=torch.__version__,
        classes=dataset.classes,
        checks=checks,
    )
    seconds = time.perf_counter() - start
    print(f"\nloss_curves.png and results.json are in {options.output}; {seconds:.0f} s in all")


def _describe(options: argparse.Namespace, classes: tuple[str, ...], train_data: Encoded, test_data: Encoded) -> None:
    on_cuda = options.device.startswith("cuda")
    device = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads"
    print(f"model   {options.model or MINILM.source}")
    print(f"data    {options.data or MOVIES.source}: {', '.join(classes)}")
    print(f"        {len(train_data.ids):,} to train on, {len(test_data.ids):,} for {options.evaluate_on}")
    print(f"device  {options.device} ({device}), {options.dtype}, PyTorch {torch.__version__}", flush=True)


def _run_method(
    options: argparse.Namespace, model: str, method: str, num_classes: int, train_data: Encoded, test_data: Encoded
) -> tuple[report.MethodResult, TextClassifier]:
    """The method's results over all seeds, and the classifier of the last one."""
    dtype = getattr(torch, options.dtype)
    autocast = dtype if method == "full" and dtype != torch.float32 else None  # its weights stay float32
    learning_rate = LEARNING_RATES[method] if options.learning_rate is None else options.learning_rate

    longest = longest_batch(train_data, options.batch_size)
    memory = step_memory(_build(options, model, method, num_classes), longest, autocast)
    correct, losses, step_ms = [], [], []
    for seed in range(options.seeds):
        classifier = _build(options, model, method, num_classes, seed)
        seed_losses, seed_ms = train(
            classifier,
            train_data,
            learning_rate=learning_rate,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=seed,
            autocast=autocast,
            description=f"{method}, seed {seed}",
        )
        predicted = predict(classifier, test_data, autocast=autocast).argmax(1)
        correct.append((predicted == test_data.labels).tolist())
        losses.append(seed_losses)
        step_ms += seed_ms
    result = report.MethodResult(
        method=method,
        learning_rate=learning_rate,
        trained_parameters=sum(parameter.numel() for parameter in trained_parameters(classifier).values()),
        step_memory_bytes=memory,
        step_ms=statistics.median(step_ms),
        accuracies=[statistics.fmean(seed) for seed in correct],
        correct=correct,
        losses=losses,
    )
    return result, classifier


def _build(options: argparse.Namespace, model: str, method: str, num_classes: int, seed: int = 0) -> TextClassifier:
    adapter = {name: getattr(options, name) for name in ("rank", "alpha", "norm_order", "device")}
    return build_classifier(model, method, num_classes, **adapter, seed=seed, dtype=getattr(torch, options.dtype))


def _check_bora(options: argparse.Namespace, model: str, trained: TextClassifier, test_data: Encoded) -> dict:
    """Save the adapter, load it into a fresh model, merge that, and say how far the predictions agree."""
    folder = options.output / "bora_adapter"
    save_adapter(trained, folder)
    data = Encoded(test_data.ids[:_CHECKED], test_data.labels[:_CHECKED], test_data.pad_id)
    expected = predict(trained, data)
    loaded = _build(options, model, "head", trained.head.out_features)
    load_adapter(loaded, folder)
    checks = {"reloaded": _compare(expected, loaded, data)}
    merge_adapter(loaded)
    checks["merged"] = _compare(expected, loaded, data)
    if importlib.util.find_spec("peft") is not None:
        for rank in _LORA_RANKS:
            checks[f"as LoRA, rank {rank}"] = _compare(expected, _as_lora(options, model, trained, rank), data)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"\nBoRA adapter: {folder}, {size / 2**20:.1f} MiB")
    for name, agreement in checks.items():
        print(
            f"  {name + ':':17} {agreement['same_labels']:,} of {agreement['examples']:,} labels as trained,"
            f" largest difference of a logit {agreement['max_logit_difference']:.2g}"
        )
    return checks


def _as_lora(options: argparse.Namespace, model: str, trained: TextClassifier, rank: int) -> nn.Module:
    """The classifier with the trained adapter as LoRA: written, and loaded by plain PEFT."""
    from peft import PeftModel

    folder = options.output / f"bora_as_lora_{rank}"
    save_as_lora(trained, folder, rank=rank, verbose=False)
    return PeftModel.from_pretrained(_build(options, model, "head", trained.head.out_features), folder)


def _compare(expected: Tensor, classifier: nn.Module, data: Encoded) -> dict:
    """The classifier's predictions beside the logits [examples, classes] that are expected of it."""
    logits = predict(classifier, data)
    same = (logits.argmax(1) == expected.argmax(1)).sum().item()
    difference = (logits - expected).abs().max().item()
    return {"examples": len(logits), "same_labels": int(same), "max_logit_difference": difference}
