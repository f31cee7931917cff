from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["OnnxNetwork"]


class OnnxNetwork(nn.Module):
    """A network exported to ONNX (``configs/export_onnx.json``), run by ONNX Runtime: on a GPU if the installed package supports one,
    otherwise on the CPU with as many threads as PyTorch.

    Args:
        path: of the ``.onnx`` file.

    Raises:
        InputError: if ONNX Runtime is not installed or cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as e:
            raise InputError(f"{path}: ONNX Runtime is needed to run it: pip install onnxruntime") from e
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; configs/export_onnx.json makes one")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers)
        except Exception as e:
            raise InputError(f"{path}: not an ONNX network ({str(e).splitlines()[0]})") from e
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, H, W), float32."""
        (output,) = self.session.run(None, {self.input: x.detach().float().cpu().numpy()})
        return torch.from_numpy(output).to(x.device)
