"""The recipes from start to end, on the tiny models that they make themselves: no network."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for _library in ("peft", "transformers", "tokenizers", "tqdm"):
    pytest.importorskip(_library, reason=f"the recipes need {_library}")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a recipe in this process, returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def call(name, *arguments):
        module = importlib.import_module(name)
        assert module.main([*arguments, "--output", str(tmp_path)]) == 0
        return capsys.readouterr().out

    return call


def numbers(pattern, text):
    """The groups of the one place where a pattern is found, as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(x) for x in ((found,) if isinstance(found, str) else found)]


@pytest.mark.parametrize("task, share", [("sft", 0.7), ("dpo", 0.6)])
def test_trl_over_four_bits(task, share, run, tmp_path):
    for library in ("trl", "datasets", "bitsandbytes"):
        pytest.importorskip(library, reason=f"the recipe needs {library}")
    first, last = numbers(r"loss ([\d.]+) at the first step, ([\d.]+) at the last", run("trl_qbora", "--task", task))
    assert last < share * first
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "BORA_BIDIMENSIONAL"


@pytest.mark.parametrize("task, row", [("sft", {"text": "the cat ."}), ("dpo", {"prompt": "a", "chosen": "cat"})])
def test_trl_reads_files_of_its_columns(task, row, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    import trl_qbora

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    options = trl_qbora._parser().parse_args(["--task", task, "--data", str(path)])
    assert trl_qbora.load_data(options)[0] == row
    (tmp_path / "rows.txt").write_text("x")
    options.data = str(tmp_path / "rows.txt")
    with pytest.raises(SystemExit, match=r"--data must end in .jsonl, .json, .csv, .parquet, got .*rows.txt"):
        trl_qbora.load_data(options)


def test_merging_into_the_quantized_and_the_dense_base(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    printed = run("merge_quantized", "--steps", "20")
    loss = {
        line[:34].strip(): float(line.split()[-1]) for line in printed.splitlines() if re.search(r"  \d\.\d{4}$", line)
    }
    dense, four_bit, trained, merged, into_dense = loss.values()
    assert list(loss)[2].startswith("with the adapter") and dense != four_bit
    assert trained < 0.6 * four_bit and into_dense < 0.6 * four_bit
    assert merged == pytest.approx(trained, abs=2e-4) and into_dense != merged
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"merged_{kind}") for kind in ("4_bit", "dense")]
    assert all(not hasattr(model.config, "quantization_config") for model in models)
    a, b = (model.state_dict()["model.layers.0.mlp.up_proj.weight"] for model in models)
    assert 0.005 < (a - b).norm() / b.norm() < 0.3  # about the rounding of 4 bits


def test_serving_merged_and_as_lora(run, tmp_path):
    from transformers import AutoModelForCausalLM

    printed = run("serve", "--rank", "64", "--steps", "30", "--tokens", "6")
    ways = dict(re.findall(r"^(base|adapter|merged|LoRA file): .* (\d) of 2 texts as with the adapter", printed, re.M))
    assert ways == {"base": "0", "adapter": "2", "merged": "2", "LoRA file": "2"}, printed
    assert printed.count("0.000%") > 14 and "--max-lora-rank 64" in printed  # the whole rank of these layers
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.layers[0].mlp.up_proj) is torch.nn.Linear
    )


@pytest.mark.parametrize("kind, also", [("unet", "conv1,proj_in"), ("transformer", None)])
def test_diffusion_models_are_saved_and_loaded_again(kind, also, run, tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers, of the extra integrations")
    more = ["--also", also] if also else []
    printed = run("diffusion", "--kind", kind, "--steps", "40", "--lora-rank", "64", *more)
    first, last = numbers(r"loss ([\d.]+) over the first steps, ([\d.]+) over the last", printed)
    assert last < 0.95 * first
    assert numbers(r"loaded as BoRA: largest difference ([\d.e+-]+)", printed)[0] < 1e-6
    assert numbers(r"loaded as LoRA by diffusers: off by ([\d.]+)% of the change", printed)[0] < 0.1
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"))
    assert all(name.startswith(f"{kind}.") for name in names)
    targets = ["to_q", *also.split(",")] if also else ["to_q", "add_k_proj", "to_add_out"]
    assert all(any(f".{target}.lora_A.weight" in name for name in names) for target in targets)


# ---- the notebook ----

NOTEBOOK = json.loads((EXAMPLES / "finetune_4bit.ipynb").read_text(encoding="utf-8"))


def test_notebook_is_plain():
    """Valid, without outputs, and its parameters stand in cells that are marked so."""
    assert NOTEBOOK["nbformat"] == 4 and {cell["cell_type"] for cell in NOTEBOOK["cells"]} == {"markdown", "code"}
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert len([cell for cell in code if cell["metadata"].get("tags") == ["parameters"]]) == 2


def test_notebook_runs_on_a_cpu(tmp_path, monkeypatch):
    """In a process of its own, with a tiny model and few steps, without the cell that installs."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _tiny

    model = _tiny.language_model(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"{text} </s>" for text in _tiny.texts()))
    settings = [
        f"CHECKOUT = {str(ROOT)!r}\n",
        f"MODEL, TEXTS, OUTPUT = {model!r}, {str(texts)!r}, {str(tmp_path / 'output')!r}\n"
        "STEPS, BATCH_SIZE, LENGTH, RANK, LEARNING_RATE = 12, 8, 16, 4, 1e-2\n",
    ]
    cells = []
    for cell in (cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"):
        source = "".join(cell["source"])
        if not source.startswith("%pip"):
            cells.append(settings.pop(0) if cell["metadata"].get("tags") == ["parameters"] else source)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(cells), encoding="utf-8")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {name: float(loss) for name, loss in re.findall(r"^(.+?) +loss ([\d.]+)$", done.stdout, re.M)}
    assert losses["with BoRA"] < 0.7 * losses["4-bit base"]
    assert losses["merged"] == pytest.approx(losses["with BoRA"], abs=2e-3)
    assert "adapted layers: 14 torch" in done.stdout and (tmp_path / "output" / "lora").is_dir()
