"""Training BoRA through PEFT: equal to the reference, checkpointed, compiled, by the Trainer, resumed."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.accuracy import assert_accurate, assert_equal
from helpers.cases import orders
from helpers.on_gpu import END
from helpers.peft_models import MODELS, bora_layers, dense_twin, make_base, make_ids, make_peft, trained_parameters
from helpers.timing import times_in_turn
from torch import nn

transformers = pytest.importorskip("transformers")
from peft import PeftModel, get_peft_model  # noqa: E402

from bora_kernels import convert  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402
from bora_kernels.integrations.transformers import ReuseScalesCallback  # noqa: E402
from bora_kernels.ops import operators, reuse  # noqa: E402

STEPS = 30


def train(model, steps, device="cpu", lr=1e-2):
    """Losses of a few steps on different batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        ids = make_ids(batch=4, seed=step % 5).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses)}


@orders
def test_thirty_steps_are_those_of_the_reference(order, device):
    base = make_base().to(device)
    model = make_peft(copy.deepcopy(base), norm_order=order, trained=False)
    plain, exact = dense_twin(base, model), dense_twin(base, model).double()
    actual = train(model, STEPS, device)
    assert actual["losses"][-5] < actual["losses"][0] - 0.2  # on the same batch
    assert_accurate(actual, train(plain, STEPS, device), train(exact, STEPS, device), samples=4 * 7)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    ids, found = make_ids(), []
    for checkpointed in (False, True):
        model = make_peft(make_base(kind)).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in trained_parameters(model).items()})
    plain, checkpointed = found
    assert_equal(checkpointed, plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_that_of_the_merged_model(kind):
    model, ids = make_peft(make_base(kind)), make_ids(batch=2, length=4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    generated = model.generate(input_ids=ids, **options)
    assert generated.shape == (2, 12)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), generated)
    assert torch.equal(model.generate(input_ids=ids, num_beams=2, **options)[:, :4], ids)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **options), generated)


def gradients(model, call, ids):
    """Gradients of a fixed loss of what ``call`` returns."""
    model.zero_grad()
    call(ids).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in trained_parameters(model).items()}


@pytest.mark.parametrize("kind, layers", [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_model_compiles_to_one_graph(kind, layers):
    """Forward and backward; a graph break is an error. What the graph is compiled to is not what is tested here."""
    torch._dynamo.reset()
    model, ids = make_peft(make_base(kind, **{layers: 1})), make_ids()
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    for name, gradient in gradients(model, model, ids).items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
def test_a_model_compiles_on_a_gpu(dtype, bound):
    """Compiled code rounds elsewhere: to the bound, relative to each gradient's norm."""
    torch._dynamo.reset()
    model, ids = make_peft(make_base().to("cuda", dtype)), make_ids().cuda()
    compiled = gradients(model, torch.compile(model, fullgraph=True), ids)
    for name, gradient in gradients(model, model, ids).items():
        error = (compiled[name] - gradient).norm() / gradient.norm()
        assert error < bound, f"{name}: {error:.1e}"


def functions_called(step) -> int:
    """How many Python functions run."""
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_layer_calls_hardly_more_functions_than_without_peft(device):
    """Each costs the host time in every step. A clock would tell that time from noise over many runs alone."""
    bare = convert(nn.Sequential(nn.Linear(40, 48)).to(device), r=4, alpha=8)
    root = nn.Sequential(nn.Linear(40, 48)).to(device)
    get_peft_model(root, BoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    x = torch.randn(3, 40, device=device)
    of_bare, of_peft = [[functions_called(lambda m=m: m(x)) for _ in range(3)][-1] for m in (bare, root)]
    assert 20 < of_peft <= of_bare + 2


@pytest.mark.gpu
def test_peft_costs_at_most_3_percent():
    """Over the layers alone, by the clock, where the device takes longer than the host."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4))).to("cuda", torch.bfloat16)

    bare = convert(base(), r=16, alpha=32)
    root = base()
    get_peft_model(root, BoraConfig(r=16, lora_alpha=32, target_modules=["0", "1", "2", "3"]))
    x, dy = (torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x.requires_grad_()
    times = times_in_turn({name: lambda m=m: m(x).backward(dy) for name, m in (("bare", bare), ("peft", root))}, 150)
    assert times["peft"] <= 1.03 * times["bare"], times


# ---- Trainer ----


class Rows(torch.utils.data.Dataset):
    """Fixed rows of tokens that predict themselves."""

    def __init__(self):
        self.ids = make_ids(batch=8, length=8, seed=9).repeat(4, 1)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def run_trainer(folder, *, base_dtype=torch.float32, resume=False, stop_at=None, callbacks=(), **options):
    """A model after a few steps of the Trainer; ``stop_at`` ends it early, after a checkpoint of that step."""
    model = make_peft(make_base(vocab_size=64).to(base_dtype), trained=False, task_type="CAUSAL_LM", lora_dropout=0.1)
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, save_steps=3, logging_steps=1, seed=3,
        use_cpu=not torch.cuda.is_available(), save_strategy="steps" if stop_at else "no", **options,
    )  # fmt: skip

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop_at

    callbacks = [*callbacks, *([Stop()] if stop_at else [])]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-3") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses


def adapter_bytes(model):
    return {name: p.detach().cpu() for name, p in trained_parameters(model).items()}


def test_the_trainer_fine_tunes_in_bf16_with_gradient_accumulation(tmp_path):
    options = {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model, losses = run_trainer(tmp_path, base_dtype=torch.bfloat16, max_steps=16, learning_rate=2e-2, **options)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    assert len(losses) == 16 and sum(losses[-3:]) < sum(losses[:3]) - 0.5
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base(vocab_size=64).to(torch.bfloat16), tmp_path / "adapter")
    ids = make_ids()
    model.eval()
    assert torch.equal(loaded(ids).logits, model.cpu()(ids).logits)


def test_the_callback_computes_norms_once_a_step(tmp_path, monkeypatch):
    """Three micro-batches share the norms of each layer, to the bit, and no scope is left open."""
    computed, forward = [], operators.forward

    def noting(*arguments, **options):
        computed.append(arguments[3] is None)  # scales
        return forward(*arguments, **options)

    monkeypatch.setattr(operators, "forward", noting)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    runs, counts = [], []
    for callbacks in ([], [ReuseScalesCallback()]):
        computed.clear()
        model, losses = run_trainer(tmp_path, callbacks=callbacks, **options)
        runs.append((adapter_bytes(model), losses))
        counts.append((len(computed), sum(computed)))
    calls = 2 * 3 * len(bora_layers(model))
    assert counts == [(calls, calls), (calls, calls // 3)] and not reuse._scopes
    (expected, losses), (actual, losses_reused) = runs
    assert losses == losses_reused
    assert_equal(actual, expected)


def test_the_callback_closes_what_a_failed_training_left_open():
    callback = ReuseScalesCallback()
    callback.on_step_begin(None, None, None)
    callback.on_step_begin(None, None, None)
    assert len(reuse._scopes) == 1
    callback.on_train_begin(None, None, None)
    assert not reuse._scopes
    callback.on_step_begin(None, None, None)
    del callback
    assert not reuse._scopes


def test_the_trainer_checkpoints_activations(tmp_path):
    """With the same dropout masks, recomputed layers train the same adapters."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain, _ = run_trainer(tmp_path / "plain")
    checkpointed, _ = run_trainer(tmp_path / "checkpointed", **options)
    expected = adapter_bytes(plain)
    for name, value in adapter_bytes(checkpointed).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_training_resumes_in_a_new_process_bit_by_bit(tmp_path):
    """Six steps are three steps, a checkpoint, and three steps by another process, optimizer and dropout included."""
    uninterrupted, _ = run_trainer(tmp_path / "whole")
    run_trainer(tmp_path / "parts", stop_at=3)
    script = (
        "import sys, torch, test_peft_training as t\n"
        "model, _ = t.run_trainer(sys.argv[1], resume=True)\n"
        "torch.save(t.adapter_bytes(model), sys.argv[1] + '/resumed.pt')" + END
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "parts")]
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    resumed = torch.load(tmp_path / "parts" / "resumed.pt")
    expected = adapter_bytes(uninterrupted)
    assert resumed.keys() == expected.keys() and len(resumed) == 4 * len(bora_layers(uninterrupted))
    assert_equal(resumed, expected)
