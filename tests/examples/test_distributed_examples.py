"""The examples of distributed training: every strategy on 1, 2 and 4 processes gives the same losses."""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.distributed import launch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
safetensors = pytest.importorskip("safetensors.torch")

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--device", "cpu", "--text", str(EXAMPLES / "finetune_trainer.py"), "--length", "16", "--adapter-rank", "3"]


def printed_losses(output: str) -> dict[int, float]:
    """The loss that was printed for each step."""
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+  loss (\S+)", output)}


def run_example(*options: str) -> dict[int, float]:
    """``finetune_distributed.py`` in a process group that is there already."""
    sys.path.insert(0, str(EXAMPLES))
    import finetune_distributed as example

    sys.argv = ["finetune_distributed.py", *SMALL, *options]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        example.train(example.parse_arguments())
    return printed_losses(output.getvalue())


def torchrun(ranks: int, *options: str) -> dict[int, float]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = str(EXAMPLES / "finetune_distributed.py")
    root = str(EXAMPLES.parent)
    done = subprocess.run(
        [sys.executable, *command, script, *SMALL, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return printed_losses(done.stdout)


def assert_same_adapters(actual: Path, expected: Path) -> None:
    """The same up to what AdamW makes of rounding errors, far below a step of 1e-3."""
    actual, expected = safetensors.load_file(actual), safetensors.load_file(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


def assert_same(actual: dict[int, float], expected: dict[int, float]) -> None:
    """Equal in the four decimals that are printed, or off by one in the last."""
    assert actual == pytest.approx(expected, abs=1.01e-4, rel=0)


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory) -> tuple[dict[int, float], Path]:
    """The losses of four steps and the adapter after them."""
    file = tmp_path_factory.mktemp("one_process") / "adapter.safetensors"
    return launch(run_example, 1, "--steps=4", f"--export={file}")[0], file


def test_loss_goes_down():
    first, *_, last = launch(run_example, 1, "--steps=30", "--lr=1e-2")[0].values()
    assert last < first - 0.5


@pytest.mark.slow
def test_run_goes_on_with_other_ranks_and_another_strategy(on_one_process, tmp_path):
    """Two steps of FSDP on 4 processes, two of DDP on 2, and the adapter at the end as one process exports it."""
    folder, file = tmp_path / "checkpoint", tmp_path / "adapter.safetensors"
    losses = launch(run_example, 4, "--strategy=fsdp", "--steps=2", "--checkpointing", f"--save={folder}")[0]
    losses |= torchrun(2, "--strategy=ddp", "--steps=4", f"--resume={folder}", "--micro-batches=2", f"--export={file}")
    expected_losses, expected_file = on_one_process
    assert_same(losses, expected_losses)
    assert_same_adapters(file, expected_file)


@pytest.mark.parametrize("ranks, strategy", [(2, "tp"), (4, "tp+fsdp")])
def test_tensor_parallel_strategies_give_the_same_losses(on_one_process, ranks, strategy):
    pytest.importorskip("bora_kernels.distributed")
    options = (f"--strategy={strategy}", "--steps=4", "--checkpointing")
    assert_same(launch(run_example, ranks, *options)[0], on_one_process[0])


# ---- Trainer and Accelerate ----


def accelerate_environment() -> dict[str, str]:
    """What ``accelerate launch`` makes of the configuration file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(EXAMPLES / "accelerate_fsdp2.yaml"), "script.py"])
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


def run_trainer(environment: dict[str, str], folder: str, file: str) -> tuple[list[float], list[str]]:
    """``finetune_trainer.py``; returns its losses and the kinds of its parameters."""
    os.environ.update(environment | {"ACCELERATE_USE_CPU": "true"})
    from accelerate.state import DistributedType, PartialState

    initialize = PartialState.__init__

    def as_accelerator(self, *args, **options):
        """Accelerate knows FSDP on accelerators only: let it take the CPU for one."""
        initialize(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = as_accelerator
    sys.path.insert(0, str(EXAMPLES))
    import finetune_trainer as example

    parser = argparse.ArgumentParser()
    example.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = example.train(parser.parse_args([*SMALL, "--steps=3", f"--export={file}"]), folder)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return history, sorted({type(p).__name__ for p in trainer.model.parameters()})


def test_trainer_under_the_accelerate_configuration(tmp_path):
    """FSDP2 by Accelerate on 2 processes, against the Trainer on one."""
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    sharded, kinds = launch(run_trainer, 2, accelerate_environment(), str(tmp_path), files[0])[0]
    assert kinds == ["DTensor"]
    whole, kinds = launch(run_trainer, 1, {}, str(tmp_path), files[1])[0]
    assert kinds == ["Parameter"]
    assert len(sharded) == 3 and sharded == pytest.approx(whole, rel=1e-6)
    assert_same_adapters(*files)


@pytest.mark.parametrize("script", ["finetune_distributed.py", "finetune_trainer.py"])
def test_missing_text_is_refused(script):
    command = [sys.executable, str(EXAMPLES / script), "--text", str(EXAMPLES / script), "nope.txt"]
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: argument --text: must be a file, got nope.txt, which is none" in done.stderr
