from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints import load_weights
from ..errors import InputError
from .initialization import start_at_zero
from .pixel_shuffle_residual import PixelShuffleResidualNet, folded, with_modules

__all__ = ["Calibration", "WithUncertainty", "check_network", "hash_of_weights"]

FLOOR = 5e-4  # of the intensity scale: the smallest standard deviation, half a step of the stored values in training
LEVEL = 0.02  # of the intensity scale: the standard deviation that an exponent does not change
START = -4.0  # natural logarithm of the first standard deviation


class Calibration(NamedTuple):
    """Calibration of standard deviations: ``factor * LEVEL * (deviation / LEVEL) ** exponent``. An exponent below 1 brings them closer to
    each other, one above 1 further apart."""

    factor: float = 1.0
    exponent: float = 1.0

    def __call__(self, deviation: Any) -> Any:
        """Tensors or arrays to the same shape; 0 stays 0."""
        return self.factor * LEVEL * (deviation / LEVEL) ** self.exponent


class WithUncertainty(nn.Module):
    """A network and a small head that says how large the error of its result is at each pixel.

    The head looks at the network's last features, on the coarse grid: three convolutions, of which the first is scaled and shifted by
    positions and facts as those of the network are. It takes about a twelfth of the network's arithmetic. The network is frozen, and its
    result does not change. The state dictionary holds the head alone, with a hash of the weights that it was trained for.

    Args:
        network: the network; positions and facts as it wants them.
        weights: file of the network's weights; ``None`` keeps those that it has.
        calibration: of the standard deviations (:mod:`bundle.uncertainty`). It applies to the finished map, which may combine several
            results of the network, so it is kept here for those who make the map.

    Raises:
        InputError: if the network is of another kind, or its weights cannot be loaded.
    """

    def __init__(self, network: nn.Module, weights: str | None = None, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.calibration = calibration or Calibration()
        network = check_network(network)
        if weights is not None:
            load_weights(network, weights)
        self.network, self.stride = network.requires_grad_(False), network.stride
        features, pixels = network.reconstruct.in_channels, network.stride**2
        self.hidden = nn.Conv2d(features, features, 3, padding=1)
        self.modulation = start_at_zero(nn.Conv2d(6 * pixels, 2 * features, 1))
        self.adaptation = start_at_zero(nn.Linear(32, 2 * features))
        self.second = nn.Conv2d(features, features // 2, 3, padding=1)
        self.logarithm = start_at_zero(nn.Conv2d(features // 2, pixels, 3, padding=1))
        self.register_buffer("trained_for", hash_of_weights(network.state_dict()))
        self.register_state_dict_post_hook(_leave_network_out)
        self.register_load_state_dict_pre_hook(_keep_network)

    @torch.no_grad()
    def folded(self, maps: Tensor, regular: bool) -> WithUncertainty:
        """Network and head for one scan, see :meth:`PixelShuffleResidualNet.folded`."""
        network = self.network.folded(maps, regular)
        if not regular:
            return with_modules(self, network=network)
        hidden = folded(self.hidden, self.changes(*self.network.embedded(maps[None])))
        return with_modules(self, network=network, hidden=hidden, modulation=None)

    def forward(self, x: Tensor) -> Tensor:
        """The network's input (N, C, H, W) -> (N, 2, H, W): its result, and the standard deviation of the error before calibration."""
        with torch.no_grad():
            features, positions, facts = self.network.features(x)
            result = self.network.result(x, features)
        hidden = self.hidden(features)
        if self.modulation is not None:
            scale, shift = self.changes(positions, facts).chunk(2, 1)
            hidden = torch.addcmul(hidden + shift, hidden, scale)
        hidden = F.relu(self.second(F.relu(hidden)))
        logarithm = F.pixel_shuffle(self.logarithm(hidden), self.network.stride)[..., : x.shape[2], : x.shape[3]]
        deviation = FLOOR + (logarithm.float() + START).clamp(max=0).exp()
        return torch.cat([result.float(), deviation], 1)

    def changes(self, positions: Tensor, facts: Tensor) -> Tensor:
        """By how much the first features are scaled and shifted: (N, 2 * features, h, w)."""
        return self.modulation(positions) + self.adaptation(facts)[:, :, None, None]


def check_network(network: nn.Module) -> PixelShuffleResidualNet:
    """The network, if it can have an uncertainty head.

    Raises:
        InputError: if it cannot.
    """
    if isinstance(network, PixelShuffleResidualNet) and network.embedding is not None:
        return network
    name = type(network).__name__ + (" without facts" if isinstance(network, PixelShuffleResidualNet) else "")
    raise InputError(f"there is no uncertainty map for this network ({name}): only the general network has one")


def hash_of_weights(state: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of weights in half precision, as they are shipped: (32,), uint8."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().cpu().half().contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _leave_network_out(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}network.")]:
        del state_dict[key]


def _keep_network(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    trained_for = state_dict.get(f"{prefix}trained_for")
    own: Any = module.trained_for
    if trained_for is not None and not torch.equal(trained_for.cpu(), own.cpu()):
        raise InputError("this uncertainty head was trained for other weights of the network: train and calibrate it again")
    for key, value in module.network.state_dict(prefix=f"{prefix}network.").items():  # type: ignore[operator, union-attr]
        state_dict.setdefault(key, value)
