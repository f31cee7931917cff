"""The networks that the paper compares or names, what their own papers say about them; and the fast one."""

import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bundle.metrics import psnr
from bundle.networks import DRCN, DRRN, FSRCNN, RCAN, RDN, SRCNN, VDSR, PixelShuffleResidualNet, SRDenseNet, SRResNet

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "configs" / "networks"
DATA = ROOT.parent / "shared" / "data" / "ds002748"
SMALL = {
    "srcnn": lambda: SRCNN((6, 5)),
    "fsrcnn": lambda: FSRCNN(6, 3, 2),
    "vdsr": lambda: VDSR(4, 5),
    "drrn": lambda: DRRN(4, 2, 3),
    "rdn": lambda: RDN(4, 2, 3, 5),
    "rcan": lambda: RCAN(16, 2, 2, 2),
    "srresnet": lambda: SRResNet(4, 3),
    "drcn": lambda: DRCN(4, 5),
    "srdensenet": lambda: SRDenseNet(2, 3, 4, 6),
    "fast": lambda: PixelShuffleResidualNet(4, 2),
}


def overlay(name):
    """The network as ``configs/networks/<name>.json`` sets it up; an ablation may leave train.json's as it is."""
    parser = ConfigParser()
    parser.read_config([ROOT / "configs" / "train.json", OVERLAYS / f"{name}.json"])
    return parser.get_parsed_content("network_def")


def count(network):
    return sum(p.numel() for p in network.parameters())


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def randomised(name):
    """A small network in double precision with random weights everywhere, statistics of batch normalisation included."""
    generator = torch.Generator().manual_seed(0)
    network = SMALL[name]().double().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / fan_in**0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.abs_().add_(0.5)
    return network


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (SRCNN, 57_281),
        (FSRCNN, 12_809),
        (VDSR, 664_704),
        (DRRN, 297_216),
        (RDN, 22_121_089 - (256 * 64 * 9 + 256)),  # as published, at x2, less the upsampler
        (RCAN, 15_442_337 - (256 * 64 * 9 + 256)),
        (SRResNet, 1_233_298),
        (DRCN, 1_775_121),
        (SRDenseNet, 1_479_425),
    ],
)
def test_defaults_have_the_published_parameters(network, parameters):
    assert count(network()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("srcnn", 57_281), ("fsrcnn", 12_809), ("vdsr", 664_704), ("drrn", 297_216), ("rdn", 1_689_857), ("rcan", 595_545),
        ("srresnet", 640_394), ("drcn", 112_017), ("srdensenet", 286_721), ("no_tv", None), ("no_branches_no_tv", 2_511_380),
    ],
)  # fmt: skip
def test_overlays_have_the_parameters_of_the_comparison(name, parameters):
    if parameters is None:
        train = json.loads((OVERLAYS.parent / "train.json").read_text())
        assert json.loads((OVERLAYS / f"{name}.json").read_text())["network_def"] == train["network_def"]
    else:
        assert count(overlay(name)) == parameters


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("srcnn", 3),
        ("fsrcnn", 8),
        ("vdsr", 20),
        ("drrn", 20),
        ("rdn", 16),
        ("rcan", 18),
        ("srresnet", 19),
        ("drcn", 20),
        ("srdensenet", 18),
    ],
)
def test_depth_is_near_19(name, convolutions):
    """Convolutions larger than 1x1 on the longest path; FSRCNN and SRCNN are as shallow as published."""
    network = overlay(name)
    longest = {}

    def depth(node):
        if node is None:
            return 0
        if node not in longest:
            kernel = next((n.variable.shape[-1] for n, _ in node.next_functions if hasattr(n, "variable") and n.variable.ndim == 4), 1)
            counted = "Convolution" in node.name() and (kernel > 1 or name == "fsrcnn")
            longest[node] = counted + max((depth(n) for n, _ in node.next_functions), default=0)
        return longest[node]

    assert depth(network(torch.rand(1, 1, 9, 9)).grad_fn) == convolutions


@pytest.mark.parametrize("name", SMALL)
def test_output_has_the_size_of_the_input(name):
    network = randomised(name)
    for size in ((1, 1), (2, 3), (31, 31), (24, 9)):
        assert network(noise(2, 1, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("name", SMALL)
def test_untrained_network_returns_an_image(name):
    x = torch.rand(2, 1, 20, 17)
    torch.testing.assert_close(SMALL[name]().eval()(x), x, rtol=0, atol=1e-6)


def test_a_network_with_positions_starts_as_one_without():
    plain, conditioned = randomised("fast"), PixelShuffleResidualNet(4, 2, positions=True).double()
    conditioned.load_state_dict(plain.state_dict())
    x = noise(2, 7, 9, 8)
    torch.testing.assert_close(conditioned(x), plain(x[:, :1]))
    for block in conditioned.deep[:-1]:
        torch.nn.init.normal_(block.modulation.weight)
    assert not torch.allclose(conditioned(x), plain(x[:, :1]))
    other = PixelShuffleResidualNet(4, 2, positions=True).double()
    other.load_state_dict(conditioned.state_dict())
    torch.testing.assert_close(other(x), conditioned(x))


@pytest.mark.parametrize("name", SMALL)
def test_slices_of_a_batch_do_not_mix(name):
    network, x = randomised(name), noise(3, 1, 8, 8)
    torch.testing.assert_close(network(x), torch.cat([network(single[None]) for single in x]))


@pytest.mark.parametrize("name", SMALL)
def test_input_is_left_as_it_was(name):
    network, x = randomised(name), noise(1, 1, 8, 8)
    before = x.clone()
    network(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_training_wakes_every_parameter(name):
    torch.manual_seed(0)
    network, x = SMALL[name]().train(), torch.rand(4, 1, 12, 12)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(x) - x.flip(-1)).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    asleep = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert asleep == []


# Each network once more, as its paper writes it: functions of the weights alone.


def convolve(w, name, x, transposed=False):
    kernel = w[f"{name}.weight"]
    if transposed:  # with stride 1, a convolution with the kernel turned by 180 degrees and its channels exchanged
        kernel = kernel.transpose(0, 1).flip(2, 3)
    return F.conv2d(F.pad(x, (kernel.shape[-1] // 2,) * 4), kernel, w.get(f"{name}.bias"))


def prelu(w, name, x):
    return torch.where(x > 0, x, w[f"{name}.weight"].view(1, -1, 1, 1) * x)


def normalise(w, name, x):
    mean, variance, scale, shift = (w[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def srcnn(w, x):
    return convolve(w, "4", F.relu(convolve(w, "2", F.relu(convolve(w, "0", x)))))


def fsrcnn(w, x):
    for layer in (0, 2, 4, 6, 8):  # extract, shrink, two of mapping, expand
        x = prelu(w, str(layer + 1), convolve(w, str(layer), x))
    return convolve(w, "10", x, transposed=True)


def vdsr(w, x):
    h = x
    for layer in range(4):
        h = F.relu(convolve(w, f"residual.{2 * layer}", h))
    return x + convolve(w, "residual.8", h)


def drrn(w, x):
    h = x
    for block in range(2):
        h0 = convolve(w, f"blocks.{block}.enter", F.relu(h) if block else h)
        h = h0
        for _ in range(3):
            h = convolve(w, f"blocks.{block}.second", F.relu(convolve(w, f"blocks.{block}.first", F.relu(h)))) + h0
    return x + convolve(w, "reconstruct", F.relu(h))


def rdn(w, x):
    f_1 = convolve(w, "shallow1", x)
    f, outputs = convolve(w, "shallow2", f_1), []
    for block in range(2):
        known = [f]
        for layer in range(3):
            known.append(F.relu(convolve(w, f"blocks.{block}.layers.{layer}", torch.cat(known, 1))))
        f = f + convolve(w, f"blocks.{block}.fusion", torch.cat(known, 1))
        outputs.append(f)
    fused = convolve(w, "fusion.1", convolve(w, "fusion.0", torch.cat(outputs, 1)))
    return x + convolve(w, "reconstruct", fused + f_1)


def rcan(w, x):
    f_0 = convolve(w, "shallow", x)
    f = f_0
    for group in range(2):
        g = f
        for block in range(2):
            key = f"deep.{group}.body.{block}.body"
            r = convolve(w, f"{key}.2", F.relu(convolve(w, f"{key}.0", g)))
            z = r.mean((2, 3), keepdim=True)
            g = g + r * torch.sigmoid(convolve(w, f"{key}.3.weight.3", F.relu(convolve(w, f"{key}.3.weight.1", z))))
        f = f + convolve(w, f"deep.{group}.body.2", g)
    return x + convolve(w, "reconstruct", f_0 + convolve(w, "deep.2", f))


def srresnet(w, x):
    f_0 = prelu(w, "shallow.1", convolve(w, "shallow.0", x))
    f = f_0
    for block in range(3):
        key = f"deep.{block}.body"
        r = prelu(w, f"{key}.2", normalise(w, f"{key}.1", convolve(w, f"{key}.0", f)))
        f = f + normalise(w, f"{key}.4", convolve(w, f"{key}.3", r))
    return x + convolve(w, "reconstruct", f_0 + normalise(w, "deep.4", convolve(w, "deep.3", f)))


def drcn(w, x):
    h = F.relu(convolve(w, "embed.2", F.relu(convolve(w, "embed.0", x))))
    predictions = []
    for _ in range(5):
        h = F.relu(convolve(w, "recur", h))
        predictions.append(x + convolve(w, "reconstruct.2", F.relu(convolve(w, "reconstruct.0", h))))
    return sum(weight * p for weight, p in zip(w["weights"], predictions)) / w["weights"].sum()


def srdensenet(w, x):
    levels = F.relu(convolve(w, "shallow", x))
    for block in range(2):
        maps = []
        for layer in range(3):
            given = torch.cat(maps, 1) if maps else levels
            maps.append(F.relu(convolve(w, f"blocks.{block}.layers.{layer}", given)))
        levels = torch.cat([levels, *maps], 1)
    return x + convolve(w, "reconstruct", F.relu(convolve(w, "bottleneck", levels)))


def fast(w, x):
    rows, columns = x.shape[-2:]
    i, j = torch.arange(0, rows, 2), torch.arange(0, columns, 2)
    positions = [(i + a, j + b) for a in (0, 1) for b in (0, 1)]
    folded = torch.cat([x[:, :, r.clamp(max=rows - 1)][..., c.clamp(max=columns - 1)] for r, c in positions], 1)
    f_0 = convolve(w, "shallow", folded)
    f = f_0
    for block in range(2):
        f = f + convolve(w, f"deep.{block}.body.2", F.relu(convolve(w, f"deep.{block}.body.0", f)))
    y = x.clone()
    for phase, residual in enumerate(convolve(w, "reconstruct", f_0 + convolve(w, "deep.2", f)).unbind(1)):
        part = y[:, 0, phase // 2 :: 2, phase % 2 :: 2]
        part += residual[:, : part.shape[1], : part.shape[2]]
    return y


@pytest.mark.parametrize("name", SMALL)
def test_network_follows_its_paper(name):
    network, x = randomised(name), noise(2, 1, 10, 7)
    expected = globals()[name](network.state_dict(), x)
    assert not torch.allclose(expected, x, atol=0.01)
    torch.testing.assert_close(network(x), expected)


def test_recursions_share_their_weights():
    assert count(DRRN(num_units=9)) == count(DRRN(num_units=25))
    assert count(DRCN(8, 3)) == count(DRCN(8, 16)) - 13  # a weight for each prediction


@pytest.fixture(scope="module")
def real_slice():
    """A slice of a test subject and its degraded self, as evaluation sees them."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data/ds002748")
    parser = ConfigParser()
    parser.read_config([ROOT / "configs" / f"{name}.json" for name in ("train", "datasets/ds002748", "evaluate")])
    parser.update({"dataset_dir": str(DATA), "axial_slices": [105, 105]})
    sample = parser.get_parsed_content("preprocessing")(parser.get_parsed_content("test_datalist")[0])
    return tuple(sample[key].as_tensor().movedim(-1, 0) for key in ("image", "label"))


@pytest.mark.parametrize("name", ["fast", *sorted(file.stem for file in (ROOT / "models" / "baselines").glob("*.pt"))])
@pytest.mark.slow
def test_shipped_weights_improve_on_bicubic_interpolation(name, real_slice):
    file = ROOT / "models" / ("fast/model.pt" if name == "fast" else f"baselines/{name}.pt")
    network = overlay(name)
    network.load_state_dict(torch.load(file, weights_only=True))
    image, truth = real_slice
    with torch.no_grad():
        gain = psnr(network.eval()(image), truth) - psnr(image, truth)
    assert float(gain) > 2


def test_fast_network_costs_a_fortieth_of_the_papers():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        overlay("fast")(torch.rand(1, 1, 32, 32))
    assert counter.get_total_flops() / 2 / 32**2 <= 184_000  # multiply-adds a pixel
