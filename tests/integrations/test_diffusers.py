"""A diffusion UNet with attention and convolutions: trained, saved, loaded, scaled, and kept from LoRA's loaders."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers, of the extra integrations")
peft = pytest.importorskip("peft")
from diffusers.loaders import StableDiffusionLoraLoaderMixin  # noqa: E402
from diffusers.utils import convert_state_dict_to_diffusers  # noqa: E402
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402

from bora_kernels.integrations.peft import BoraConfig, BoraConv2d, BoraLinear  # noqa: E402

TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj"]


def make_unet():
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 12)}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(cross_attention_dim=6, **sizes, **blocks).eval()


def config():
    return BoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 3, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 4, 6, generator=generator),
    )


def run(unet):
    with torch.no_grad():
        return unet(*inputs()).sample


def train(unet, steps=6):
    """Losses of a UNet that learns to give back its input."""
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = (unet(*inputs()).sample - inputs()[0]).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def trained():
    """A UNet with an adapter by diffusers' own method, and its output before."""
    unet = make_unet()
    start = run(unet)
    unet.requires_grad_(False)
    unet.add_adapter(config())
    layers = [type(m) for m in unet.modules() if hasattr(m, "full_scaling")]
    assert {BoraConv2d, BoraLinear} == set(layers) and len(layers) > 20
    losses = train(unet)
    assert losses[-1] < 0.9 * losses[0]
    return unet, start


def test_the_route_of_the_guide_trains_saves_loads_and_merges(tmp_path):
    base = make_unet()
    unet = get_peft_model(base, config())
    losses = train(unet)
    assert losses[-1] < 0.9 * losses[0]
    expected = run(unet)
    unet.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_unet(), tmp_path)
    torch.testing.assert_close(run(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(loaded.get_base_model()), expected, rtol=1e-5, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert (
        type(merged) is diffusers.UNet2DConditionModel and merged.state_dict().keys() == make_unet().state_dict().keys()
    )
    torch.testing.assert_close(run(merged), expected, rtol=1e-3, atol=1e-4)


def test_what_a_training_script_saves_of_the_model_is_set_again(trained):
    unet, _ = trained
    other = make_unet()
    other.add_adapter(config())
    missing = set_peft_model_state_dict(other, get_peft_model_state_dict(unet))
    assert not missing.unexpected_keys and torch.equal(run(other), run(unet))


def test_loaders_of_lora_refuse_its_files(trained, tmp_path):
    """They would drop the magnitudes with no more than a line in the log."""
    unet, _ = trained
    unet.save_lora_adapter(tmp_path / "model")
    with pytest.raises(TypeError, match="LoraConfig"):
        make_unet().load_lora_adapter(
            tmp_path / "model", prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
        )

    class Pipeline(StableDiffusionLoraLoaderMixin):
        unet_name, text_encoder_name = "unet", "text_encoder"

        def __init__(self):
            self.unet, self.text_encoder, self.components = make_unet(), None, {}

    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    Pipeline.save_lora_weights(tmp_path / "pipeline", unet_lora_layers=weights)
    pipeline = Pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(tmp_path / "pipeline")
    assert not hasattr(pipeline.unet, "peft_config")


def test_weights_of_set_adapters_are_shares_of_the_change(trained):
    unet, start = trained
    full = run(unet)
    unet.set_adapters("default", weights=[0.0])
    torch.testing.assert_close(run(unet), start, rtol=1e-4, atol=1e-5)
    unet.set_adapters("default", weights=[0.5])
    half = run(unet)
    assert 0.1 < (half - start).norm() / (full - start).norm() < 0.9
    unet.set_adapters("default", weights=[1.0])
    assert torch.equal(run(unet), full)


def test_fusing_is_merging(trained):
    unet, _ = trained
    expected = run(unet)
    unet.fuse_lora(adapter_names=["default"])
    torch.testing.assert_close(run(unet), expected, rtol=1e-3, atol=1e-4)
    unet.unfuse_lora()
    assert torch.equal(run(unet), expected)
