"""float32 products follow PyTorch's setting for TF32, through whichever of its interfaces it was made."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import Case, check_layer

pytest.importorskip("triton", reason="needs triton")

from bora_kernels.ops.triton_parts import product_precision


@pytest.fixture(autouse=True)
def _settings():
    """Puts back what a test sets. The older interface refuses to be read after the newer one was used."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    matmul.fp32_precision = (
        "none"  # as in a new process: what another test set for products would hide the other setting
    )
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, matmul.fp32_precision = before
    assert not matmul.allow_tf32


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def high():
    torch.set_float32_matmul_precision("high")


def matmul(value):
    torch.backends.cuda.matmul.fp32_precision = value


def everywhere(value, of_matmul=None):
    torch.backends.fp32_precision = value
    if of_matmul is not None:
        matmul(of_matmul)


SETTINGS = {
    "untouched": (lambda: None, "ieee"),
    "allow_tf32": (allow_tf32, "tf32x3"),
    "high": (high, "tf32x3"),
    "matmul-tf32": (lambda: matmul("tf32"), "tf32x3"),
    "matmul-ieee": (lambda: matmul("ieee"), "ieee"),
    "everywhere-tf32": (lambda: everywhere("tf32"), "tf32x3"),
    "everywhere-ieee": (lambda: everywhere("ieee"), "ieee"),
    "everywhere-tf32-matmul-ieee": (lambda: everywhere("tf32", "ieee"), "ieee"),
    "everywhere-ieee-matmul-tf32": (lambda: everywhere("ieee", "tf32"), "tf32x3"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_products_follow_the_setting(name, device):
    change, expected = SETTINGS[name]
    change()
    if torch.version.hip is None:
        assert product_precision(torch.float32) == expected
    assert product_precision(torch.bfloat16) == product_precision(torch.float16)
    case = Case(9, 20, 24, 4)
    check_layer("triton", case.inputs(device), case.upstream(device))
