from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from training.objectives.contrastive import contrastive_loss
from training.objectives.exact import in_float32
from training.objectives.sigmoid import sigmoid_loss

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def tf32() -> Iterator[None]:
    """As `train.precision = tf32` has it; the switch is there without a GPU too."""
    before = MATMUL.allow_tf32
    MATMUL.allow_tf32 = True
    yield
    MATMUL.allow_tf32 = before


def test_inside_autocast_rounds_nothing() -> None:
    ones = torch.ones(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
        with in_float32(ones.device):
            assert (ones @ ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16


@pytest.mark.usefixtures("tf32")
def test_inside_tf32_is_off_and_afterwards_as_before() -> None:
    gpu = torch.device("cuda")
    with in_float32(gpu), in_float32(gpu):
        assert not MATMUL.allow_tf32
    assert MATMUL.allow_tf32
    with pytest.raises(ZeroDivisionError), in_float32(gpu):
        raise ZeroDivisionError
    assert MATMUL.allow_tf32
    with in_float32(torch.device("cpu")):
        assert MATMUL.allow_tf32  # no business of a CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.usefixtures("tf32")
def test_losses_are_as_exact_where_towers_multiply_in_tf32() -> None:
    gpu = torch.device("cuda")
    random = torch.Generator(gpu).manual_seed(0)
    rows = torch.randn(2, 1024, 512, device=gpu, generator=random)
    image, text = F.normalize(rows + rows.mean(0), dim=2)
    scale, bias = torch.tensor([100.0, -10.0], device=gpu)
    for tile_size in (None, 256):
        loss = contrastive_loss(image, text, scale, tile_size=tile_size)
        exact = contrastive_loss(image.double(), text.double(), scale.double())
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    exact = sigmoid_loss(image.double(), text.double(), scale.double(), bias.double())
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(exact.item(), rel=1e-5)
