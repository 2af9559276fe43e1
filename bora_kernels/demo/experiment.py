"""The demo from start to end: train every method, report, then save, reload and merge the BoRA classifier."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

from .. import load_adapter, merge_adapter, save_adapter
from . import report
from .data import Encoded, encode, load_dataset, load_movies, longest_batch, split
from .models import AdapterOptions, TextClassifier, build_classifier, model_source, trained_parameters
from .packages import MINILM, MOVIES, fetch
from .training import predict, step_memory, train

# Each is the best of a grid on the validation split, mean of two seeds, with the default options: lora, dora
# and bora 5e-4 to 4e-3 and full 1e-4 to 4e-4 in steps of 2, head 3e-3 to 3e-2 in steps of about 3. To repeat
# it: --evaluate-on validation --seeds 2 --learning-rate ...
LEARNING_RATES = {"head": 1e-2, "lora": 2e-3, "dora": 2e-3, "bora": 2e-3, "full": 2e-4}
_VALIDATION_SIZE = 2000
_CHECKED = 500  # test examples on which the reloaded and the merged model are compared with the trained one
_MEMORY_MEASURE = "tensors that one step adds to the model, longest batch"


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the same texts."""

    examples: int
    same_labels: int
    max_logit_difference: float


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    model: str | None  # None: MiniLM from its package
    data: str | None  # None: the movie snippets from their package
    methods: tuple[str, ...]
    adapter: AdapterOptions
    epochs: int
    batch_size: int
    max_length: int
    learning_rate: float | None  # None: LEARNING_RATES
    train_size: int
    test_size: int
    evaluate_on: str
    seeds: int
    device: str
    dtype: str
    output: Path
    cache_dir: Path


def run(settings: Settings) -> None:
    """Run the demo and print its results; files go to ``settings.output``."""
    start = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = model_source(settings.model) if settings.model else str(fetch(MINILM, settings.cache_dir))
    dataset = load_movies(settings.cache_dir) if settings.data is None else load_dataset(settings.data)
    splits = split(dataset, settings.train_size, _VALIDATION_SIZE, settings.test_size)
    tokenizer = AutoTokenizer.from_pretrained(model)
    train_data = encode(splits.train, tokenizer, settings.max_length)
    test_data = encode(getattr(splits, settings.evaluate_on), tokenizer, settings.max_length)
    _describe(settings, dataset.classes, train_data, test_data)

    settings.output.mkdir(parents=True, exist_ok=True)
    results, bora = [], None
    for method in settings.methods:
        result, classifier = _run_method(settings, model, method, len(dataset.classes), train_data, test_data)
        results.append(result)
        bora = classifier if method == "bora" else bora

    print("\n" + report.format_table(results, _MEMORY_MEASURE))
    checks = {} if bora is None else _check_bora(settings, model, bora, test_data)
    names = [Path(settings.model or "MiniLM").name, Path(settings.data or "movie sentiment").name]
    report.plot_losses(settings.output / "loss_curves.png", results, title=" on ".join(names))
    report.write_json(
        settings.output / "results.json",
        results,
        settings=asdict(settings),
        torch=torch.__version__,
        classes=dataset.classes,
        checks={name: asdict(agreement) for name, agreement in checks.items()},
    )
    seconds = time.perf_counter() - start
    print(f"\nloss_curves.png and results.json are in {settings.output}; {seconds:.0f} s in all")


def _describe(settings: Settings, classes: tuple[str, ...], train_data: Encoded, test_data: Encoded) -> None:
    on_cuda = settings.device.startswith("cuda")
    device = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads"
    print(f"model   {settings.model or MINILM.source}")
    print(f"data    {settings.data or MOVIES.source}: {', '.join(classes)}")
    print(f"        {len(train_data.ids):,} to train on, {len(test_data.ids):,} for {settings.evaluate_on}")
    print(f"device  {settings.device} ({device}), {settings.dtype}, PyTorch {torch.__version__}", flush=True)


def _run_method(
    settings: Settings, model: str, method: str, num_classes: int, train_data: Encoded, test_data: Encoded
) -> tuple[report.MethodResult, TextClassifier]:
    """The method's results over all seeds, and the classifier of the last one."""
    dtype = getattr(torch, settings.dtype)
    autocast = dtype if method == "full" and dtype != torch.float32 else None  # its weights stay float32
    learning_rate = LEARNING_RATES[method] if settings.learning_rate is None else settings.learning_rate

    def build(seed: int) -> TextClassifier:
        return build_classifier(
            model, method, num_classes, settings.adapter, seed=seed, device=settings.device, dtype=dtype
        )

    memory = step_memory(build(0), longest_batch(train_data, settings.batch_size), autocast)
    correct, losses, step_ms = [], [], []
    for seed in range(settings.seeds):
        classifier = build(seed)
        log = train(
            classifier,
            train_data,
            learning_rate=learning_rate,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=seed,
            autocast=autocast,
            description=f"{method}, seed {seed}",
        )
        predicted = predict(classifier, test_data, autocast=autocast).argmax(1)
        correct.append((predicted == test_data.labels).tolist())
        losses.append(log.losses)
        step_ms += log.step_ms
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


def _check_bora(settings: Settings, model: str, trained: TextClassifier, test_data: Encoded) -> dict[str, Agreement]:
    """Save the adapter, load it into a fresh model, merge that, and say how far the predictions agree."""
    folder = settings.output / "bora_adapter"
    save_adapter(trained, folder)
    data = Encoded(test_data.ids[:_CHECKED], test_data.labels[:_CHECKED], test_data.pad_id)
    expected = predict(trained, data)
    loaded = build_classifier(
        model,
        "head",
        trained.head.out_features,
        settings.adapter,
        device=settings.device,
        dtype=getattr(torch, settings.dtype),
    )
    load_adapter(loaded, folder)
    checks = {"reloaded": _compare(expected, loaded, data)}
    merge_adapter(loaded)
    checks["merged"] = _compare(expected, loaded, data)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"\nBoRA adapter: {folder}, {size / 2**20:.1f} MiB")
    for name, agreement in checks.items():
        print(
            f"  {name + ':':10} {agreement.same_labels:,} of {agreement.examples:,} labels as trained,"
            f" largest difference of a logit {agreement.max_logit_difference:.2g}"
        )
    return checks


def _compare(expected: Tensor, classifier: nn.Module, data: Encoded) -> Agreement:
    """The classifier's predictions beside the logits [examples, classes] that are expected of it."""
    logits = predict(classifier, data)
    same = (logits.argmax(1) == expected.argmax(1)).sum().item()
    return Agreement(len(logits), int(same), (logits - expected).abs().max().item())
