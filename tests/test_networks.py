import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bundle.errors import InputError
from bundle.networks import MultiScaleResidualNet, PixelShuffleResidualNet, load_torchscript
from bundle.networks.multi_scale_residual import MultiScaleResidualModule


def randomise(network):
    """Random double-precision weights everywhere: the reconstruction convolution too, and a different slope for every PReLU."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.double().parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan_in**0.5)
    return network


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def count(network):
    return sum(p.numel() for p in network.parameters())


def convolve(weights, name, x):
    """Zero-padded correlation as one shifted product per kernel position: no convolution routine involved."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    k = kernel.shape[-1]
    padded = F.pad(x, (k // 2,) * 4)
    height, width = x.shape[-2:]
    output = bias.view(1, -1, 1, 1)
    for i in range(k):
        for j in range(k):
            output = output + torch.einsum("nchw,dc->ndhw", padded[..., i : i + height, j : j + width], kernel[..., i, j])
    return output


def prelu(weights, name, v):
    """(1)"""
    return torch.where(v > 0, v, weights[f"{name}.weight"] * v)


def extraction(weights, x, prefix="extract."):
    """(2), (3)"""
    f1 = prelu(weights, f"{prefix}1", convolve(weights, f"{prefix}0", x))
    return prelu(weights, f"{prefix}3", convolve(weights, f"{prefix}2", f1))


def residual_module(weights, u, prefix="", multi_scale=True):
    """(9) to (16)"""
    f1 = prelu(weights, f"{prefix}first.1", convolve(weights, f"{prefix}first.0", u))
    f2 = prelu(weights, f"{prefix}first.3", convolve(weights, f"{prefix}first.2", f1))
    fm = f2 + convolve(weights, f"{prefix}branch7", u) if multi_scale else f2
    f3 = prelu(weights, f"{prefix}second.1", convolve(weights, f"{prefix}second.0", fm))
    f4 = prelu(weights, f"{prefix}second.3", convolve(weights, f"{prefix}second.2", f3))
    return f4 + convolve(weights, f"{prefix}branch5", u) if multi_scale else f4


def whole_network(weights, x, num_modules, multi_scale=True):
    """(2) to (8)"""
    f2 = extraction(weights, x)
    fb = f2
    for n in range(num_modules):
        fb = residual_module(weights, fb, f"mapping.{n}.", multi_scale) + f2
    return prelu(weights, "reconstruct.1", convolve(weights, "reconstruct.0", fb)) + x


def longest_path(node, kind, known):
    """Most nodes of one kind on any path of an autograd graph."""
    if node is None:
        return 0
    if node not in known:
        known[node] = (kind in node.name()) + max((longest_path(n, kind, known) for n, _ in node.next_functions), default=0)
    return known[node]


def test_defaults_are_the_papers_network():
    network = MultiScaleResidualNet()
    assert count(network) == 7_362_068
    assert len(network.mapping) == 4
    assert network.extract[0].out_channels == 128


@pytest.mark.parametrize("multi_scale", [True, False])
def test_longest_path_has_19_convolutions(multi_scale):
    output = MultiScaleResidualNet(features=2, multi_scale=multi_scale)(torch.rand(1, 1, 7, 7))
    assert longest_path(output.grad_fn, "ConvolutionBackward", {}) == 19


def test_extraction_follows_its_equations():
    network, x = randomise(MultiScaleResidualNet(features=5)), noise(2, 1, 9, 8)
    torch.testing.assert_close(network.extract(x), extraction(network.state_dict(), x))


@pytest.mark.parametrize("multi_scale", [True, False])
def test_residual_module_follows_its_equations(multi_scale):
    module, u = randomise(MultiScaleResidualModule(5, multi_scale)), noise(2, 5, 9, 8)
    torch.testing.assert_close(module(u), residual_module(module.state_dict(), u, multi_scale=multi_scale))


@pytest.mark.parametrize("num_modules", [1, 2, 4])
@pytest.mark.parametrize("multi_scale", [True, False])
def test_network_follows_its_equations(num_modules, multi_scale):
    network = randomise(MultiScaleResidualNet(features=4, num_modules=num_modules, multi_scale=multi_scale))
    x = noise(2, 1, 10, 7)
    output = network(x)
    assert not torch.allclose(output, x, atol=0.01)
    torch.testing.assert_close(output, whole_network(network.state_dict(), x, num_modules, multi_scale))


def test_every_activation_has_one_slope_of_its_own():
    slopes = [m for m in MultiScaleResidualNet(features=4).modules() if isinstance(m, nn.PReLU)]
    assert len(slopes) == 2 + 4 * 4 + 1
    assert {m.weight.numel() for m in slopes} == {1}
    assert len({id(m.weight) for m in slopes}) == 19


def test_ablation_has_the_parameters_of_the_3x3_convolutions_only():
    first, inner, last = 9 * 128 + 128, 9 * 128 * 128 + 128, 9 * 128 + 1
    assert count(MultiScaleResidualNet(multi_scale=False)) == first + 17 * inner + last + 19


def test_ablation_removes_exactly_the_7x7_and_5x5_convolutions():
    full = MultiScaleResidualNet(features=6, num_modules=3).state_dict()
    ablation = MultiScaleResidualNet(features=6, num_modules=3, multi_scale=False).state_dict()
    removed = [full[key].shape[-1] for key in full.keys() - ablation.keys() if key.endswith("weight")]
    assert sorted(removed) == [5, 5, 5, 7, 7, 7]
    assert {key: full[key].shape for key in ablation} == {key: ablation[key].shape for key in ablation}


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (31, 31), (16, 16), (24, 9), (9, 24)])
def test_output_has_the_size_of_the_input(size):
    network = randomise(MultiScaleResidualNet(features=3, num_modules=1))
    assert network(noise(2, 1, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("multi_scale", [True, False])
def test_untrained_network_returns_its_input(multi_scale):
    x = noise(2, 1, 12, 9, dtype=torch.float32)
    assert torch.equal(MultiScaleResidualNet(features=8, multi_scale=multi_scale)(x), x)


def test_slices_of_a_batch_do_not_mix():
    network, x = randomise(MultiScaleResidualNet(features=3, num_modules=2)), noise(3, 1, 8, 8)
    torch.testing.assert_close(network(x), torch.cat([network(single[None]) for single in x]))


def test_gradients_reach_every_parameter():
    network, x = randomise(MultiScaleResidualNet(features=4)), noise(2, 1, 12, 12)
    network(x).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_one_step_from_the_zero_start_wakes_every_parameter():
    torch.manual_seed(0)
    network, x = MultiScaleResidualNet(features=8), noise(4, 1, 12, 12, dtype=torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if not p.grad.any()] == []


def test_weights_survive_a_file(tmp_path):
    network, x = randomise(MultiScaleResidualNet(features=4)), noise(1, 1, 8, 8)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    other = MultiScaleResidualNet(features=4).double()
    assert not torch.allclose(other(x), network(x))
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), network(x))


@pytest.mark.parametrize(
    "arguments, value", [({"features": 0}, "0"), ({"features": -3}, "-3"), ({"num_modules": 0}, "0"), ({"num_modules": -2}, "-2")]
)
def test_bad_argument_is_named(arguments, value):
    with pytest.raises(ValueError, match=rf"positive.*(?<![\d-]){value}\b"):
        MultiScaleResidualNet(**arguments)


@pytest.mark.parametrize(("positions", "given"), [(False, 7), (True, 1)])
def test_a_wrong_number_of_channels_is_refused(positions, given):
    network = PixelShuffleResidualNet(features=4, num_blocks=1, positions=positions)
    with pytest.raises(ValueError, match=f"{7 if positions else 1} channels expected, got {given}"):
        network(torch.zeros(1, given, 8, 8))


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    missing, damaged = tmp_path / "missing.ts", tmp_path / "damaged.ts"
    damaged.write_bytes(b"nothing of use")
    for path, why in ((missing, "no such file; python -m monai.bundle ckpt_export makes one"), (damaged, "not a TorchScript network")):
        with pytest.raises(InputError, match=f"{path.name}: {why}"):
            load_torchscript(path, torch.device("cpu"))
