"""What PEFT and transformers do for LoRA alone: each place where they ask for it, and what that means for BoRA.

``PLACES`` lists them by file, as found in PEFT 0.21.2 and transformers 5.23; a test looks whether there are others.
"""

import re
from pathlib import Path

import pytest
import torch
from helpers.peft_models import bora_layers, make_base, make_ids, make_peft
from helpers.people import make
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

peft = pytest.importorskip("peft")
import transformers  # noqa: E402
from peft import PeftModel, XLoraConfig, get_peft_model  # noqa: E402
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer  # noqa: E402
from peft.tuners.lora.intruders import reduce_intruder_dimension  # noqa: E402
from peft.utils.hotswap import prepare_model_for_compiled_hotswap  # noqa: E402

import bora_kernels  # noqa: E402
from bora_kernels.integrations.peft import BoraConfig  # noqa: E402

# Lines that ask whether a type is LORA, or a module, model or configuration of LoRA's classes, and the answer for BoRA.
PLACES = {
    "peft/helpers.py": (2, "check_if_peft_model: as any; rescale_adapter_scale: a share of W' − W0, tested below"),
    "peft/mapping_func.py": (1, "a warning for init_lora_weights='eva', which BoraConfig refuses"),
    "peft/peft_model.py": (5, "PiSSA made LoRA: refused; the card's tag: not LoRA's; two lines of documentation"),
    "peft/tuners/lora/conversion.py": (1, "convert_to_lora: makes the nearest LoRA, see test_peft_lora_files"),
    "peft/tuners/lora/eva.py": (1, "data-driven start: refused by BoraConfig"),
    "peft/tuners/lora/intruders.py": (2, "reduce_intruder_dimension: refused by PEFT"),
    "peft/tuners/lora/model.py": (9, "LoraModel itself; batches of several adapters, aLoRA, MonteCLoRA, KaSA: refused"),
    "peft/tuners/mixed/model.py": (3, "PeftMixedModel: refused by PEFT"),
    "peft/tuners/tuners_utils.py": (1, "Mamba's layers: refused by BoraModel, for more models, see test_model_kinds"),
    "peft/tuners/xlora/model.py": (
        3,
        "X-LoRA loads adapters as LoRA: refused by PEFT, which finds the magnitudes",
    ),
    "peft/utils/hotswap.py": (2, "hotswap_adapter: refused by PEFT; what prepares a model for it changes no result"),
    "peft/utils/save_and_load.py": (
        2,
        "empty shards of tensors: BoraModel's warning; tensor parallel: refused",
    ),
    "peft/utils/transformers_weight_conversion.py": (2, "experts of transformers 4: refused by BoraModel"),
    "transformers/integrations/peft.py": (1, "hotswap: refused by transformers"),
}
_ASKS = re.compile(
    r"""PeftType\.LORA\b|["']LORA["']|isinstance\([^\n]*\b(LoraLayer|LoraModel|lora\.Linear|LoraConfig)\b"""
)
_NOT_ASKING = ("class ", "#", ">>>", "...", '"peft_type": "LORA"', "LORA =", "self.peft_type =")
VERSIONS = {"peft": "0.21.2", "transformers": "5.23.0"}


@pytest.mark.skipif(
    {"peft": peft.__version__, "transformers": transformers.__version__} != VERSIONS, reason=f"PLACES is of {VERSIONS}"
)
def test_every_place_that_asks_for_lora_is_listed():
    found: dict[str, int] = {}
    for library, patterns in ((peft, ["**/*.py"]), (transformers, ["*.py", "integrations/*.py"])):
        root = Path(library.__file__).parent
        for path in (path for pattern in patterns for path in root.glob(pattern)):
            name = path.relative_to(root.parent).as_posix()
            for line in path.read_text(encoding="utf-8").splitlines():
                if _ASKS.search(line) and not any(mark in line for mark in _NOT_ASKING):
                    found[name] = found.get(name, 0) + 1
    assert found == {name: count for name, (count, _) in PLACES.items()}


# ---- refused ----


def q_proj(**options):
    return make_peft(make_base(), target_modules=["q_proj"], **options)


def another_of_lora(model, folder):
    peft.utils.hotswap.hotswap_adapter(model, folder, "default")


def loaded_as_experts_of_transformers_4(model, folder):
    path = folder / "adapter_model.safetensors"
    state = {name.replace("self_attn.q_proj", "mlp.experts.0.w1"): t for name, t in load_file(path).items()}
    save_file(state, path)
    PeftModel.from_pretrained(make("mixtral"), folder)


def x_lora(model, folder):
    base = make_base()
    base.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters={"a": str(folder)})
    get_peft_model(base, config)


REFUSED = {
    "hotswap": (another_of_lora, ValueError, "Hotswapping only supports LORA but BORA_BIDIMENSIONAL"),
    "hotswap-transformers": (
        lambda model, folder: model.get_base_model().load_adapter(folder, hotswap=True, adapter_name="default"),
        ValueError,
        "Hotswapping is currently only supported for LoRA|there must already be an existing adapter",
    ),
    "intruders": (
        lambda model, _: reduce_intruder_dimension(model, "default", "new"),
        ValueError,
        "is not using LoRA",
    ),
    "pissa-to-lora": (
        lambda model, folder: model.save_pretrained(folder, path_initial_model_for_weight_conversion=folder),
        NotImplementedError,
        "its adapters are not additive",
    ),
    "mixed": (
        lambda *_: get_peft_model(make_base(), BoraConfig(target_modules=["q_proj"]), mixed=True),
        ValueError,
        "not compatible with the `PeftMixedModel`",
    ),
    "x-lora": (x_lora, ValueError, "unexpected_keys=.*lora_magnitude_vector_col"),
    "experts": (loaded_as_experts_of_transformers_4, ValueError, r"must fit the model, got .*experts.0.w1.*3 axes"),
    "weighted": (
        lambda model, _: model.add_weighted_adapter(["default"], [0.5], "new"),
        NotImplementedError,
        "not defined for BoRA",
    ),  # fmt: skip
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_what_only_lora_can_is_refused(call, error, message, tmp_path):
    model = q_proj()
    with torch.no_grad():
        expected = model(make_ids()).logits
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        call(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(make_ids()).logits, expected)


def test_lora_fas_optimizer_is_refused_at_its_first_step():
    model = q_proj(trained=False)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    model(input_ids=make_ids(), labels=make_ids()).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(TypeError, match="optimizer must not be LoraFAOptimizer"):
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


COMPUTED = {
    "weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "spectral_norm-conv": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
    "parametrization": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
    "pruned-embedding": lambda: prune.random_unstructured(nn.Embedding(4, 4), "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed_are_refused(layer):
    base = nn.ModuleDict({"fit": nn.Linear(4, 4), "unfit": layer()})
    with pytest.raises(ValueError, match="Target module unfit .* its weight is computed from others in each call"):
        make_peft(base, target_modules=["fit", "unfit"])
    assert not bora_layers(base)


class Router(nn.Linear):
    """Linear by its class, and a router by what it returns."""

    def forward(self, x):
        return super().forward(x).topk(1)


class EightBits(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def test_subclasses_of_linear_are_refused_with_a_true_sentence():
    for layer, sentence in ((Router(4, 4), "a Router has a forward of its own"), (EightBits(4, 4), "in 8 bits; load")):
        base = nn.Sequential(nn.Linear(4, 4), layer)
        with pytest.raises(ValueError, match=rf"Target module 1 .*{sentence}.*exclude_modules leaves layers out"):
            make_peft(base, target_modules="all-linear")
        make_peft(base, target_modules="all-linear", exclude_modules=["1"])


def test_embeddings_are_resized_before_a_model_is_adapted():
    """Tied to the embedding, an adapted head would get a weight that its adapter does not fit."""
    for targets in (["lm_head", "q_proj"], ["lm_head"]):
        model = make_peft(make_base(tie_word_embeddings=True), target_modules=targets)
        model.get_base_model().tie_weights()  # as it is
        with pytest.raises(ValueError, match=r"weight of lm_head must stay .*got \[50, 32\]: resize"):
            model.resize_token_embeddings(50, mean_resizing=False)
        converted = bora_kernels.convert(make_base(tie_word_embeddings=True), r=2, target_modules=targets)
        with pytest.raises(ValueError, match=r"weight must stay \[40, 32\], got \[50, 32\]: resize embeddings before"):
            converted.resize_token_embeddings(50, mean_resizing=False)
    model = make_peft(make_base(tie_word_embeddings=True), target_modules=["q_proj"])
    model.resize_token_embeddings(50, mean_resizing=False)
    assert model(make_ids()).logits.shape[-1] == 50


# ---- handled ----


def outputs(model, inputs):
    with torch.no_grad():
        return model(inputs)


def test_preparing_for_hotswap_changes_no_result():
    """It pads the factors with zeros and makes tensors of the scalings."""
    model = q_proj()
    expected = outputs(model, make_ids()).logits
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    torch.testing.assert_close(outputs(model, make_ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_loraplus_trains_magnitudes():
    model = q_proj(trained=False)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=make_ids(), labels=make_ids()).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and "lora_A" not in n)


def test_empty_shards_are_warned_of_when_an_adapter_is_saved(tmp_path):
    model = q_proj()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = torch.empty(0)
    with pytest.warns(UserWarning, match="2 tensors of the adapter are empty, .*lora_A.* gather sharded parameters"):
        model.save_pretrained(tmp_path)


# ---- cards and automatic classes ----


def test_the_model_card_says_which_import_makes_peft_know_the_method(tmp_path):
    model = q_proj()
    model.add_adapter("second", BoraConfig(r=2, target_modules=["k_proj"]))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text.count("from bora_kernels.integrations.peft import BoraConfig") == 1
    assert text.startswith("## How to load") and (tmp_path / "README.md").read_text().startswith("---\n")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_automatic_class_finds_the_base_of_an_adapter_of_this_package(kind, tmp_path):
    make_base(kind).save_pretrained(tmp_path / "base")
    base = type(make_base(kind)).from_pretrained(tmp_path / "base")
    bora_kernels.save_adapter(bora_kernels.convert(base, r=2), tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(
        outputs(loaded, make_ids()).logits, outputs(base, make_ids()).logits, rtol=1e-5, atol=1e-5
    )
    assert type(loaded.get_base_model()) is type(base)
