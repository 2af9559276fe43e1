"""The examples from start to end: a tiny random language model, a handful of texts, no network."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = "the a cat dog bird sees hears likes small big red . <s> </s> <unk>".split()


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- plain PyTorch ----


@pytest.mark.parametrize("method", ["bora", "dora"])
def test_use_in_your_model(method, capsys):
    load("use_in_your_model").main(["--method", method, "--steps", "60"])
    printed = capsys.readouterr().out
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if ", loss " in line]
    assert len(losses) == 2 and losses[1] < 0.02, printed
    assert "adapted layers: 4 torch" in printed and "loaded, largest difference 0.0e+00" in printed
    assert float(printed.split()[-1]) < 1e-5, printed


# ---- a language model, with PEFT ----


@pytest.fixture(scope="module")
def finetune():
    for library in ("peft", "transformers", "accelerate", "datasets", "bora_kernels.integrations.peft"):
        pytest.importorskip(library, reason=f"the example needs {library}: pip install '.[examples]'")
    return load("finetune_llm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random two-layer Llama and a tokenizer of a dozen words."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}",
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=2, tie_word_embeddings=True, initializer_range=0.2, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        f"the {size} {one} {verb} the {other} ."
        for size in ("small", "big", "red")
        for one in ("cat", "dog", "bird")
        for verb in ("sees", "hears", "likes")
        for other in ("cat", "dog", "bird")
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(finetune, model, texts, tmp_path, monkeypatch):
    """Runs the example, returns its results."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*arguments, output=tmp_path / "output"):
        given = ["--model", model, "--data", texts, "--output", str(output), "--dtype", "float32"]
        given += ["--rank", "4", "--alpha", "8", "--learning-rate", "1e-2", "--validation-share", "0.2"]
        assert finetune.main([*given, *arguments]) == 0
        return json.loads((output / "results.json").read_text())

    return call


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "method, dtype",
    [("lora", "float32"), ("dora", "float32"), ("bora", "float32"), ("bora", "bfloat16")],
)
def test_finetune_llm(method, dtype, run, model, device, tmp_path, capsys):
    """The loss falls; the adapter and the merged model on disk are the trained model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ("--method", method, "--dtype", dtype, "--max-steps", "12", "--gradient-checkpointing")
    losses = run(*options)["losses"]
    printed = capsys.readouterr().out
    assert losses[method] < 0.8 * losses["base"], losses
    assert losses["merged"] == pytest.approx(losses[method], rel=1e-4 if dtype == "float32" else 1e-2)
    backend = "triton" if device == "cuda" else "torch"
    assert "perplexity" in printed and (f"adapted layers: 14 {backend}" in printed) == (method != "lora")

    output = tmp_path / "output"
    ids = AutoTokenizer.from_pretrained(output / "merged")("the red cat sees", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.allclose(base(ids).logits, AutoModelForCausalLM.from_pretrained(output / "merged")(ids).logits)
    adapted = PeftModel.from_pretrained(base, output / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_finetune_llm_resumes_to_the_bit(run, device, tmp_path, capsys):
    if device == "cuda":
        pytest.skip("the attention of transformers is not reproducible on CUDA")
    from safetensors.torch import load_file

    options = (
        "--max-steps",
        "6",
        "--save-steps",
        "3",
        "--accumulate",
        "2",
        "--batch-size",
        "4",
        "--merged-dtype",
        "none",
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(*options, output=straight)
    shutil.copytree(straight / "checkpoints" / "checkpoint-3", resumed / "checkpoints" / "checkpoint-3")
    capsys.readouterr()
    run(*options, output=resumed)
    assert "going on from" in capsys.readouterr().out
    expected, actual = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (straight, resumed))
    assert expected.keys() == actual.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not (resumed / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finetune_llm_over_four_bits(run, dtype, tmp_path):
    for library in ("bitsandbytes", "bora_kernels.quantized"):
        pytest.importorskip(library, reason=f"quantized bases need {library}")
    from transformers import AutoModelForCausalLM

    losses = run("--method", "qbora", "--dtype", dtype, "--max-steps", "12")["losses"]
    assert losses["qbora"] < 0.8 * losses["base"], losses
    near = 1e-4 if dtype == "float32" else 1e-2  # merged into what the 4-bit weights stand for
    assert losses["merged"] == pytest.approx(losses["qbora"], rel=near), losses
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "merged")
    plain = {"Linear", "Embedding", "LlamaRMSNorm"}
    assert {type(m).__name__ for m in merged.modules() if list(m.parameters(recurse=False))} == plain
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.float32


def test_rows_of_every_kind(finetune, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    text = finetune.encode_row({"text": "a cat"}, tokenizer, 9)
    assert text["input_ids"] == text["labels"] == ids("a cat </s>")
    pair = finetune.encode_row({"prompt": "a cat", "completion": " sees a dog"}, tokenizer, 4)
    assert pair == {"input_ids": ids("a cat sees a"), "labels": [-100, -100, *ids("sees a")]}
    chat = finetune.encode_row({"messages": [{"role": "a", "content": "dog"}]}, tokenizer, 9)
    assert chat["input_ids"] == chat["labels"] == ids("a dog </s>")
    with pytest.raises(ValueError, match="--data must have text, prompt and completion, or messages, got label, body"):
        finetune.encode_row({"label": 1, "body": "x"}, tokenizer, 9)


SCRIPTS = sorted(EXAMPLES.glob("[!_]*.py"))
HELP = f"""
import contextlib, importlib.abc, io, json, runpy, sys, traceback
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "peft", "transformers", "accelerate", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, {str(EXAMPLES)!r})
printed = {{}}
for script in {[str(path) for path in SCRIPTS]}:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_path(script, run_name="__main__")
            code = "none: it ran on"
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    printed[script] = (code, output.getvalue())
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def helps():
    """How each example ends with --help, and what it prints, where the libraries of the extras are not installed."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_needs_no_library(script, helps):
    code, printed = helps[str(script)]
    assert code == 0, code
    assert f"{EXAMPLES.name}/{script.name}" in printed and "--" in printed


def test_missing_library_is_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    with pytest.raises(SystemExit, match="1"):
        load("finetune_llm").main(["--model", "a", "--data", "b"])
    assert capsys.readouterr().err == 'this example needs datasets: pip install ".[examples]"\n'


@pytest.mark.parametrize("name", ["texts.pdf", "nope.jsonl", "./nope", "no/such/folder"])
def test_unreadable_data_is_refused(finetune, tmp_path, monkeypatch, name, capsys):
    """Before anything is loaded: there is no model "nowhere"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.pdf").write_text("x")
    with pytest.raises(SystemExit, match="2"):
        finetune.main(["--model", "nowhere", "--data", name])
    expected = (
        "must end in .jsonl, .json" if name == "texts.pdf" else "must be a file, a folder or a data set of the hub"
    )
    error = capsys.readouterr().err
    assert f"error: --data {expected}" in error and name in error


def test_help_on_rounding_says_what_the_readme_says(finetune, capsys):
    with pytest.raises(SystemExit, match="0"):
        finetune.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "rounds, by less than a unit and without bias" in printed and "rounds small updates" not in printed
