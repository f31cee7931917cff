import copy
import platform

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from bundle.memory import keep_freed_memory
from bundle.networks import FFTConv2d, MultiScaleResidualNet, fft_convolution, prepare, use_fft_convolutions


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def twins(in_channels, out_channels, kernel, bias=True, dtype=torch.float32):
    """An ``nn.Conv2d`` with known weights and the FFT convolution of the same weights."""
    plain = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias, dtype=dtype)
    with torch.no_grad():
        for seed, p in enumerate(plain.parameters()):
            p.copy_(noise(*p.shape, dtype=dtype, seed=seed + 5))
    fft = FFTConv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias, dtype=dtype)
    fft.load_state_dict(plain.state_dict())
    return plain, fft


def results(convolution, x):
    """Output, and the gradient of a random functional of it to the input and every parameter."""
    x = x.clone().requires_grad_()
    output = convolution(x)
    functional = (output * noise(*output.shape, dtype=output.dtype, seed=99)).sum()
    return [output.detach(), *torch.autograd.grad(functional, [x, *convolution.parameters()])]


def assert_same(found, expected, relative=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= relative * b.abs().max()


def randomise(network):
    with torch.no_grad():
        for seed, p in enumerate(network.parameters()):
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(noise(*p.shape, seed=seed) / fan_in**0.5)
    return network


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 75), st.integers(1, 75), st.sampled_from([3, 5, 7, 9]), st.integers(1, 3))
@example(31, 31, 7, 3)  # one tile
@example(32, 32, 5, 1)  # the largest tile
@example(70, 45, 7, 3)  # 3 x 2 tiles
@example(33, 2, 5, 1)  # a strip of tiles
@example(1, 5, 3, 1)
def test_output_and_gradients_are_those_of_conv2d(height, width, kernel, batch):
    for dtype, relative in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        plain, fft = twins(2, 3, kernel, dtype=dtype)
        x = noise(batch, 2, height, width, dtype=dtype)
        assert_same(results(fft, x), results(plain, x), relative)


@pytest.mark.parametrize(("size", "batch"), [((130, 41), 1), ((65, 97), 2)])
def test_bands_of_a_large_slice_give_the_result_of_conv2d(size, batch, monkeypatch):
    monkeypatch.setattr(fft_convolution, "MAX_PIXELS", 3000)
    plain, fft = twins(3, 4, 7)
    x = noise(batch, 3, *size)
    assert_same(results(fft, x), results(plain, x))


def test_convolution_may_have_no_bias():
    plain, fft = twins(3, 2, 5, bias=False)
    x = noise(2, 3, 40, 12)
    assert_same(results(fft, x), results(plain, x))


def test_memory_layout_does_not_matter():
    plain, fft = twins(4, 4, 3)
    x = noise(2, 4, 20, 37)
    assert_same([fft(x.to(memory_format=torch.channels_last)), fft(x.mT.contiguous().mT)], [plain(x), plain(x)])


@pytest.mark.parametrize("size", [(4, 3), (33, 1)])
def test_gradients_match_finite_differences(size):
    _, fft = twins(2, 2, 3, dtype=torch.float64)
    x = noise(1, 2, *size, dtype=torch.float64).requires_grad_()

    def convolve(x, weight, bias):
        return torch.func.functional_call(fft, {"weight": weight, "bias": bias}, x)

    assert torch.autograd.gradcheck(convolve, (x, fft.weight, fft.bias))


def test_training_goes_on_after_inference():
    plain, fft = twins(3, 3, 5)
    x = noise(1, 3, 11, 13)
    with torch.inference_mode():
        fft(x)
    assert_same(results(fft, x), results(plain, x))


def test_frozen_weights_still_pass_gradients_on():
    plain, fft = twins(3, 3, 5)
    x = noise(1, 3, 11, 13).requires_grad_()
    gradients = [torch.autograd.grad(c.requires_grad_(False)(x).square().sum(), x)[0] for c in (fft, plain)]
    assert_same(gradients[:1], gradients[1:])


def test_second_derivatives_are_refused_not_wrong():
    _, fft = twins(3, 3, 3, dtype=torch.float64)
    x = noise(1, 3, 6, 6, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(fft(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kernel", [5, 7])
def test_wide_same_convolution_is_replaced(kernel):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(32, 48, kernel, padding=kernel // 2)))
    assert use_fft_convolutions(network) is network
    assert isinstance(network[0][0], FFTConv2d)


@pytest.mark.parametrize(
    "convolution",
    [
        pytest.param(nn.Conv2d(32, 32, 5, padding=2, stride=2), id="strided"),
        pytest.param(nn.Conv2d(64, 64, 5, padding=2, groups=2), id="grouped"),
        pytest.param(nn.Conv2d(32, 32, 5, padding=2, dilation=2), id="dilated"),
        pytest.param(nn.Conv2d(32, 32, 5, padding=2, dilation=(1, 2)), id="dilated along one axis"),
        pytest.param(nn.Conv2d(32, 32, 6, padding=3), id="even kernel"),
        pytest.param(nn.Conv2d(32, 32, (7, 5), padding=(3, 2)), id="rectangular kernel"),
        pytest.param(nn.Conv2d(32, 32, 1), id="1x1 kernel"),
        pytest.param(nn.Conv2d(32, 32, 3, padding=1), id="3x3 kernel"),
        pytest.param(nn.Conv2d(32, 32, 5), id="no padding"),
        pytest.param(nn.Conv2d(32, 32, 5, padding=3), id="much padding"),
        pytest.param(nn.Conv2d(32, 32, 5, padding=2, padding_mode="reflect"), id="reflecting"),
        pytest.param(nn.Conv2d(1, 32, 5, padding=2), id="few channels in"),
        pytest.param(nn.Conv2d(32, 1, 5, padding=2), id="few channels out"),
        pytest.param(nn.ConvTranspose2d(32, 32, 5, padding=2), id="transposed"),
    ],
)
def test_other_convolution_is_left_alone(convolution):
    kind, x = type(convolution), noise(1, convolution.in_channels, 9, 8)
    expected = convolution(x)
    use_fft_convolutions(nn.Sequential(convolution))
    assert type(convolution) is kind
    assert torch.equal(convolution(x), expected)


def test_parameters_keep_their_names_and_values():
    network = randomise(MultiScaleResidualNet(features=32, num_modules=1))
    before = copy.deepcopy(network.state_dict())
    parameters = list(network.parameters())
    after = use_fft_convolutions(network).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


@pytest.mark.parametrize("size", [(31, 31), (40, 27)])
def test_network_gives_the_same_output_and_gradients(size):
    plain = randomise(MultiScaleResidualNet(features=32, num_modules=1))
    fft = use_fft_convolutions(copy.deepcopy(plain))
    assert sum(isinstance(m, FFTConv2d) for m in fft.modules()) == 2
    x = noise(2, 1, *size)
    with torch.no_grad():
        expected = plain(x)
        assert not torch.allclose(expected, x, atol=0.01)
        assert_same([fft(x)], [expected])
    # gradients in double precision: that of a PReLU slope is one sum over an image, which cancels
    assert_same(results(fft.double(), x.double()), results(plain.double(), x.double()), 1e-9)


@pytest.mark.parametrize("asked, switched", [(False, False), (True, True), ("false", False), ("true", True)])
def test_prepare_switches_only_when_asked(asked, switched):
    network = prepare(MultiScaleResidualNet(features=32, num_modules=1), torch.device("cpu"), asked)
    assert any(isinstance(m, FFTConv2d) for m in network.modules()) is switched


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_freed_feature_map_is_not_cleared_by_the_system_again():
    resource = pytest.importorskip("resource", reason="not on Windows")
    assert keep_freed_memory()
    faults = []
    for _ in range(20):  # until the heap has room for it
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 23)  # 32 MB, allocated and freed
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000  # pages of 4 kB; all of them are 8192
