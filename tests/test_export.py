"""A network as others run it: ONNX under onnxruntime, at any batch size."""

from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import nn

from gsa_models import create_model


def network(**settings: Any) -> nn.Module:
    """A network in eval mode whose every block does something and whose statistics are not the defaults."""
    torch.manual_seed(0)
    model = create_model("gsa_resnet_tiny", image_size=32, num_classes=5, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("expand_norm.weight"):
            nn.init.ones_(parameter)
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)  # torch's own
@pytest.mark.parametrize(
    "settings",
    [{"placement": "gcgg"}, {"window": 3, "query_softmax": True}],
    ids=str,
)
def test_onnxruntime_computes_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    model, file = network(**settings), tmp_path / "model.onnx"
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    example = (torch.randn(2, 3, 32, 32),)
    torch.onnx.export(model, example, str(file), dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = torch.randn(n, 3, 32, 32)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-6)
