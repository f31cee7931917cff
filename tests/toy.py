"""Toy volumes in every format, and a tiny network's checkpoint. Affines are nibabel's: index to RAS+ world, in mm."""

from __future__ import annotations

import datetime
import locale
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import itk
import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from bundle.dicom_volume import write_file
from bundle.networks import MultiScaleResidualNet

SHAPE = (40, 36, 6)
TINY = {"features": 4, "num_modules": 1}
TINY_OVERRIDES = {f"network_def::{key}": value for key, value in TINY.items()}
TINY_INFERENCE = {  # the paper's network in the place of the general one
    "network_def": {"_target_": "bundle.networks.MultiScaleResidualNet", **TINY},
    "positions": False,
    "facts": False,
    "interpolation": "@degradation",
}


def head(shape: Sequence[int] = SHAPE, peak: float = 1000.0, seed: int = 0) -> np.ndarray:
    """Smooth ellipsoid with a soft texture on a zero background: whole numbers in float32, different along every axis.

    The background is at least a tenth of the slice wide on each side; every slice holds some of the head.
    """
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, 3)
    x, y, z = np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in shape), indexing="ij")
    radius = (x / 0.8) ** 2 + (y / 0.75) ** 2 + (z / 1.6) ** 2
    texture = 0.75 + 0.12 * np.sin(7 * x + phase[0]) + 0.08 * np.sin(5 * y + 2 * x + phase[1]) + 0.05 * np.sin(3 * z + phase[2])
    # the factor of x and y leaves no mirror symmetry
    return np.rint(peak * np.clip(1 - radius, 0, None) ** 0.75 * texture * (1 + 0.15 * x + 0.1 * y)).astype(np.float32)


def volume(shape: Sequence[int] = (70, 64, 60), spacing: Sequence[float] = (1, 1, 1), name: str = "a.nii.gz") -> dict:
    """A head as training loads it: (1, X, Y, Z), intensities from 0 to 1."""
    image = MetaTensor(torch.from_numpy(head(shape))[None].float(), affine=torch.diag(torch.tensor([*spacing, 1.0])))
    image = image / image.max()
    image.meta["filename_or_obj"] = name
    return {"image": image}


def bicubic(volume: np.ndarray, factor: int) -> np.ndarray:
    """Each axial slice of a volume in RAS order, enlarged by Pillow."""
    size = (volume.shape[1] * factor, volume.shape[0] * factor)
    slices = [Image.fromarray(volume[..., k].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for k in range(volume.shape[2])]
    return np.stack(slices, -1)


def affine(
    spacing: Sequence[float] = (1.0, 1.0, 2.0),
    degrees: Sequence[float] = (0.0, 0.0, 0.0),
    origin: Sequence[float] = (-20.0, -18.0, 5.0),
) -> np.ndarray:
    """Spacing in mm, then rotations about x, y and z, then the origin in mm: (4, 4)."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
        rotation = turn @ rotation
    return nib.affines.from_matvec(rotation @ np.diag(spacing), origin)


def stored_as(axcodes: str, array: np.ndarray, to_world: np.ndarray, given: str = "RAS") -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its axes stored in another order and direction, e.g. ``"PIR"`` for sagittal slices."""
    change = ornt_transform(axcodes2ornt(given), axcodes2ornt(axcodes))
    stored = nib.orientations.apply_orientation(array, change)
    return np.ascontiguousarray(stored), to_world @ inv_ornt_aff(change, array.shape)


def write_nifti(
    path: Path,
    array: np.ndarray | None = None,
    to_world: np.ndarray | None = None,
    dtype: type = np.float32,
    slope: float | None = None,
    inter: float = 0.0,
) -> Path:
    """NIfTI of ``array`` (a head by default) in ``dtype``; with ``slope`` it is stored as ``(array - inter) / slope``."""
    array = head() if array is None else array
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = array if slope is None else np.rint((array - inter) / slope)
    image = nib.Nifti1Image(stored.astype(dtype), affine() if to_world is None else to_world)
    image.header.set_data_dtype(dtype)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope or 1.0, inter], "<f4").tobytes()  # nibabel would choose its own
    with nib.openers.Opener(path, "wb") as stream:
        stream.write(bytes(content))
    return path


def write_itk(path: Path, array: np.ndarray | None = None, to_world: np.ndarray | None = None, dtype: type = np.float32) -> Path:
    """MetaImage (``.mha``, ``.mhd``) or NRRD (``.nrrd``, ``.nhdr``), by extension. A fourth axis of ``array`` holds vectors."""
    array = head() if array is None else array
    to_world = affine() if to_world is None else to_world
    path.parent.mkdir(parents=True, exist_ok=True)
    spacing = nib.affines.voxel_sizes(to_world)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    axes = (2, 1, 0, 3)[: array.ndim]
    image = itk.image_from_array(np.ascontiguousarray(array.transpose(axes).astype(dtype)), is_vector=array.ndim == 4)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in to_lps @ to_world[:3, 3]])
    image.SetDirection(itk.matrix_from_array(to_lps @ to_world[:3, :3] / spacing))
    itk.imwrite(image, str(path), compression=path.suffix in (".mha", ".nrrd"))
    return path


def write_analyze(path: Path, array: np.ndarray | None = None, to_world: np.ndarray | None = None, dtype: type = np.int16) -> Path:
    """Analyze 7.5 pair: ``path`` ends with ``.img``; the header goes to ``.hdr``. The format keeps the spacing only."""
    array = head() if array is None else array
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.AnalyzeImage(array.astype(dtype), affine() if to_world is None else to_world).to_filename(path)
    return path


def write_dicom(folder: Path, array: np.ndarray | None = None, to_world: np.ndarray | None = None, extension: str = ".dcm") -> Path:
    """DICOM series of MR slices, one file per plane of the last axis; the first axis runs along the rows of the pictures."""
    array = head() if array is None else array
    to_world = affine() if to_world is None else to_world
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ to_world
    spacing = nib.affines.voxel_sizes(to_world)
    study, series, frame = (generate_uid() for _ in range(3))
    for k in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"slice{k + 1:03d}{extension}"
        ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientName, ds.PatientID, ds.Modality = "Toy^Head", "toy", "MR"
        ds.StudyDate = datetime.date(2020, 1, 1).strftime("%Y%m%d")
        ds.SeriesNumber, ds.InstanceNumber = 1, k + 1
        ds.ImagePositionPatient = [f"{v:.9g}" for v in lps[:3, 3] + k * lps[:3, 2]]
        ds.ImageOrientationPatient = [f"{v:.9g}" for v in (*lps[:3, 0] / spacing[0], *lps[:3, 1] / spacing[1])]
        ds.PixelSpacing = [f"{spacing[1]:.9g}", f"{spacing[0]:.9g}"]
        ds.SliceThickness = f"{spacing[2]:.9g}"
        ds.Rows, ds.Columns = array.shape[1], array.shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 1
        ds.PixelData = array[..., k].T.astype("<i2").tobytes()
        write_file(path, ds)
    return folder


def write_subjects(folder: Path, count: int = 5, shape: Sequence[int] = SHAPE) -> list[Path]:
    """``sub-01.nii.gz`` and so on, each another head."""
    return [write_nifti(folder / f"sub-{n:02d}.nii.gz", head(shape, seed=n)) for n in range(1, count + 1)]


def random_network(network: torch.nn.Module) -> torch.nn.Module:
    """The network with random weights, such that its features neither vanish nor explode."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=(parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
    return network.eval()


def save_checkpoint(path: Path, random: bool = True, seed: int = 0) -> Path:
    """Weights of the network of ``TINY``: random, small ones; or those of an untrained one, which returns its input."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    network = MultiScaleResidualNet(**TINY)
    if random:
        torch.nn.init.normal_(network.reconstruct[0].weight, std=0.05)
    torch.set_rng_state(generator_state)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def write_mixed(folder: Path) -> Path:
    """Two DICOM series in one folder: a head, and a smaller one of another seed."""
    for n, array in enumerate((head(), head((30, 28, 4), seed=1))):
        for path in write_dicom(folder / str(n), array).iterdir():
            path.rename(folder / f"{n}{path.name}")
        (folder / str(n)).rmdir()
    return folder


def compress_dicom(folder: Path, method: str) -> Path:
    """Compress every slice of a series without loss: ``"RLE"``, ``"JPEG"`` (process 14) or ``"JPEG2000"``."""
    before = locale.setlocale(locale.LC_ALL)
    for path in folder.iterdir():
        if method == "RLE":
            ds = pydicom.dcmread(path)
            ds.compress(RLELossless)
            ds.save_as(path)
            continue
        image = itk.imread(str(path), pixel_type=itk.SS, imageio=itk.GDCMImageIO.New())
        image_io = itk.GDCMImageIO.New()
        image_io.KeepOriginalUIDOn()
        image_io.SetCompressor(method)
        itk.ImageFileWriter[type(image)].New(Input=image, FileName=str(path), ImageIO=image_io, UseCompression=True).Update()
    locale.setlocale(locale.LC_ALL, before)  # ITK's DICOM writer leaves it at "C"
    return folder


def enhance_dicom(folder: Path, frames: Sequence[int] | None = None) -> Path:
    """Make a series one file of several frames (enhanced MR), ``frames`` of its slices; returns the folder."""
    files = sorted(folder.iterdir())
    slices = [pydicom.dcmread(path) for path in files]
    slices = slices if frames is None else [slices[n] for n in frames]
    ds = slices[0]
    own = [_group(PlanePositionSequence=_group(ImagePositionPatient=s.ImagePositionPatient)) for s in slices]
    ds.SharedFunctionalGroupsSequence = [
        _group(
            PlaneOrientationSequence=_group(ImageOrientationPatient=ds.ImageOrientationPatient),
            PixelMeasuresSequence=_group(
                PixelSpacing=ds.PixelSpacing, SliceThickness=ds.SliceThickness, SpacingBetweenSlices=ds.SliceThickness
            ),
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = own
    ds.NumberOfFrames, ds.PixelData = len(slices), b"".join(s.PixelData for s in slices)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    for key in ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(ds, key)
    for path in files:
        path.unlink()
    ds.save_as(folder / "frames.dcm")
    return folder


def _group(**elements) -> Dataset:
    """A dataset; what is one itself becomes a sequence of one."""
    ds = Dataset()
    for key, value in elements.items():
        setattr(ds, key, [value] if isinstance(value, Dataset) else value)
    return ds


def edit_header(path: Path, **fields) -> Path:
    """Change fields of the header of an uncompressed NIfTI file, byte by byte: nibabel would keep them in order."""
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, nib.nifti1.header_dtype, count=1).copy()
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.tobytes()
    path.write_bytes(content)
    return path


def _bytes(content: bytes, name: str = "bad.nii.gz") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _nifti(change: Callable[[np.ndarray], np.ndarray], dtype: type = np.float32) -> Callable[[Path], Path]:
    return lambda folder: write_nifti(folder / "bad.nii.gz", change(head()), dtype=dtype)


def _with_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[20, 18, 3] = value
        return array

    return change


def _truncated(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_nifti(folder / name, np.random.default_rng(0).random(SHAPE) * 100)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


def _damaged_gzip(folder: Path) -> Path:
    """One bit of the voxels has turned: a gzip reader notices at the end of the file only."""
    path = write_nifti(folder / "bad.nii.gz", np.random.default_rng(0).random(SHAPE) * 100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return path


def _rgb(folder: Path) -> Path:
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    colours["R"] = head() / 4
    nib.Nifti1Image(colours, affine()).to_filename(folder / "bad.nii.gz")
    return folder / "bad.nii.gz"


def _header(**fields) -> Callable[[Path], Path]:
    return lambda folder: edit_header(write_nifti(folder / "bad.nii"), **fields)


def _without_raw(folder: Path) -> Path:
    path = write_itk(folder / "bad.mhd")
    path.with_suffix(".raw").unlink()
    return path


def _dicom(change: Callable[[list[Path]], object]) -> Callable[[Path], Path]:
    """A series of six slices, changed: ``change`` gets its files."""

    def write(folder: Path) -> Path:
        series = write_dicom(folder / "bad series")
        change(sorted(series.iterdir()))
        return series

    return write


def _enlarge_pixels(path: Path) -> None:
    ds = pydicom.dcmread(path)
    ds.PixelSpacing = [1.2, 1.2]
    ds.save_as(path)


def _move(path: Path, *shift: float) -> None:
    ds = pydicom.dcmread(path)
    ds.ImagePositionPatient = [float(a) + b for a, b in zip(ds.ImagePositionPatient, shift)]
    ds.save_as(path)


def _copy_of(path: Path) -> None:
    ds = pydicom.dcmread(path)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PixelData = (ds.pixel_array + 1).tobytes()
    ds.save_as(path.with_name("copy.dcm"))


def _over_time(files: list[Path]) -> None:
    for path in files:
        ds = pydicom.dcmread(path)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.InstanceNumber += len(files)
        ds.PixelData = (ds.pixel_array + 1).tobytes()
        ds.save_as(path.with_name(f"later {path.name}"))


def _tilt(files: list[Path]) -> None:
    for n, path in enumerate(files):
        _move(path, 0, 0.3 * n, 0)


def _without_position(files: list[Path]) -> None:
    for path in files:
        ds = pydicom.dcmread(path)
        del ds.ImagePositionPatient
        ds.save_as(path)


def _link(folder: Path) -> Path:
    (folder / "bad.nii.gz").symlink_to("moved away.nii.gz")
    return folder / "bad.nii.gz"


def _picture(folder: Path) -> Path:
    picture = BytesIO()
    Image.fromarray(head()[..., 3].astype(np.uint8)).save(picture, "png")
    return _bytes(picture.getvalue(), "bad.nii")(folder)


_PARALLEL = {"srow_x": [1, 1, 0, 0], "srow_y": [0, 0, 0, 0], "srow_z": [0, 0, 2, 0]}
_NAN = [np.nan] * 4

# what is wrong -> function that writes the file below a folder and returns its path, whose name starts with "bad"
BAD_VOLUMES: dict[str, Callable[[Path], Path]] = {
    "no bytes": _bytes(b""),
    "truncated gzip": _truncated("bad.nii.gz"),
    "gzip with a turned bit": _damaged_gzip,
    "truncated": _truncated("bad.nii"),
    "text": _bytes(b"not a volume\n" * 50, "bad.nii"),
    "no raw file": _without_raw,
    "one plane": _nifti(lambda array: array[..., 3]),
    "NaN": _nifti(_with_voxel(np.nan)),
    "infinite": _nifti(_with_voxel(np.inf)),
    "constant": _nifti(lambda array: np.full_like(array, 7), np.int16),
    "all zero": _nifti(np.zeros_like, np.uint8),
    "singular affine": _header(sform_code=1, qform_code=0, **_PARALLEL),
    "singular sform beside a good qform": _header(sform_code=1, qform_code=1, **_PARALLEL),
    "sform of NaN": _header(sform_code=1, srow_x=_NAN, srow_y=_NAN, srow_z=_NAN),
    "beyond float32": _nifti(_with_voxel(1e300), np.float64),
    "corrupt header: unknown type": _header(datatype=9999),
    "corrupt header: negative size": _header(dim=[3, 40, -36, 6, 1, 1, 1, 1]),
    "corrupt header: larger than the file": _header(dim=[3, 30000, 30000, 30, 1, 1, 1, 1]),
    "corrupt header: not a NIfTI magic": _header(magic=b"xyz", sizeof_hdr=7),
    "NIfTI named .mha": lambda folder: write_nifti(folder / "bad.nii").rename(folder / "bad.mha"),
    "PNG named .nii": _picture,
    "voxels that begin within the header": _header(vox_offset=0),
    "broken link": _link,
    "DICOM: a slice is missing": _dicom(lambda files: files[3].unlink()),
    "DICOM: two different slices at one place": _dicom(lambda files: _copy_of(files[2])),
    "DICOM: a series over time": _dicom(_over_time),
    "DICOM: uneven slice distances": _dicom(lambda files: _move(files[3], 0, 0, 0.5)),
    "DICOM: tilted gantry": _dicom(_tilt),
    "DICOM: no positions": _dicom(_without_position),
    "DICOM: a slice with larger pixels": _dicom(lambda files: _enlarge_pixels(files[2])),
    "DICOM, enhanced: a frame is missing": _dicom(lambda files: enhance_dicom(files[0].parent, [0, 1, 2, 4, 5])),
    "DICOM, enhanced: a series over time": _dicom(lambda files: enhance_dicom(files[0].parent, [0, 1, 2, 0, 1, 2])),
    "DICOM: a truncated slice": _dicom(lambda files: files[2].write_bytes(files[2].read_bytes()[:-2000])),
}


def _named(name: str, array: np.ndarray, dtype: type) -> Callable[[Path], Path]:
    return lambda folder: write_nifti(folder / name, array, dtype=dtype)


_PHASE = np.angle(np.exp(1j * np.add.outer(np.linspace(0, 20, 40 * 36).reshape(40, 36), np.arange(6.0))))

# what is no scan -> function that writes the file below a folder and returns its path
NO_SCANS: dict[str, Callable[[Path], Path]] = {
    "time series": _nifti(lambda array: np.stack([array] * 3, -1)),
    "colours": _rgb,
    "vectors": lambda folder: write_itk(folder / "bad.mha", np.stack([head()] * 3, -1)),
    "mask": _named("mask.nii.gz", (head() > 200).astype(float), np.uint8),
    "label map": _named("aseg.nii.gz", np.digitize(head(), [100, 400, 700]).astype(float) * 7, np.int16),
    "file name says BOLD": _named("sub-01_task-rest_bold.nii.gz", head(), np.int16),
    "phase map": _named("B0.nii.gz", _PHASE, np.float32),
}


class Stored(NamedTuple):
    """A volume on disk, and what it should be read as: a RAS array with its affine."""

    path: Path
    array: np.ndarray
    to_world: np.ndarray


def _odd(
    array: np.ndarray | None = None,
    to_world: np.ndarray | None = None,
    name: str = "odd.nii",
    axcodes: str = "RAS",
    header: dict | None = None,
    **arguments,
) -> Callable[[Path], Stored]:
    def write(folder: Path) -> Stored:
        volume = head() if array is None else array
        at = affine() if to_world is None else to_world
        path = write_nifti(folder / name, *stored_as(axcodes, volume, at), **arguments)
        return Stored(edit_header(path, **header) if header else path, volume, at)

    return write


def _renamed(name: str, wrong: str) -> Callable[[Path], Stored]:
    return lambda folder: Stored(write_nifti(folder / name).rename(folder / wrong), head(), affine())


def _odd_dicom(method: str) -> Callable[[Path], Stored]:
    return lambda folder: Stored(compress_dicom(write_dicom(folder / "odd series"), method), head(), affine())


def _odd_slices(change: Callable[[Dataset, int], object], array: np.ndarray | None = None) -> Callable[[Path], Stored]:
    """A series whose slices are changed: ``change`` gets each and its number; ``array`` is what the series should be read as."""

    def write(folder: Path) -> Stored:
        series = write_dicom(folder / "odd series")
        for number, path in enumerate(sorted(series.iterdir())):
            ds = pydicom.dcmread(path)
            change(ds, number)
            ds.save_as(path)
        return Stored(series, head() if array is None else array, affine())

    return write


def _deflate(ds: Dataset, number: int) -> None:
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def _rescale(ds: Dataset, number: int) -> None:
    ds.RescaleSlope, ds.RescaleIntercept = 0.5 + number / 2, -10


def _enhanced(folder: Path) -> Stored:
    to_world = affine((0.9, 1.2, 3), (14, -9, 25))
    return Stored(enhance_dicom(write_dicom(folder / "odd series", to_world=to_world), [5, 4, 3, 2, 1, 0]), head(), to_world)


def _big_endian(folder: Path) -> Stored:
    image = nib.Nifti1Image(head(), affine(), nib.Nifti1Header(endianness=">"))
    image.to_filename(folder / "odd.nii")
    return Stored(folder / "odd.nii", head(), affine())


_QFORM = {"qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 0, "pixdim": [1, 1, 1, 2, 0, 0, 0, 0]}

# what is odd -> function that writes the volume below a folder and says what it should be read as
ODD_VOLUMES: dict[str, Callable[[Path], Stored]] = {
    "one slice": _odd(head((40, 36, 1))),
    "1 x 1 x N": _odd(head((1, 1, 6))),
    "1 x N x N": _odd(head((1, 36, 6))),
    "negative values": _odd(head() - 300),
    "uint8": _odd(head(peak=250), dtype=np.uint8),
    "int16": _odd(dtype=np.int16),
    "uint16": _odd(head(peak=60000), dtype=np.uint16),
    "int32": _odd(dtype=np.int32),
    "int32 with its largest value": _odd(_with_voxel(2**31 - 1)(head().astype(np.float64)), dtype=np.int32),
    "float64": _odd(dtype=np.float64),
    "big-endian": _big_endian,
    "scl_slope and scl_inter": _odd(dtype=np.int16, slope=0.5, inter=-100),
    "a fourth axis of one": lambda folder: Stored(write_nifti(folder / "odd.nii", head()[..., None]), head(), affine()),
    "a fourth and a fifth axis of one": lambda folder: Stored(write_nifti(folder / "odd.nii", head()[..., None, None]), head(), affine()),
    "gzip named .nii": _renamed("a.nii.gz", "odd.nii"),
    "plain NIfTI named .nii.gz": _renamed("a.nii", "odd.nii.gz"),
    "gzip named .Nii": _renamed("a.nii.gz", "odd.Nii"),
    "an unknown unit of length": _odd(header={"xyzt_units": 5}),
    "a qform that is no rotation": _odd(header={"qform_code": 1, "quatern_b": 2, "quatern_c": 2, "quatern_d": 2}),
    "sagittal, oblique": _odd(to_world=affine((1, 1, 2), (12, -7, 20)), axcodes="PIR"),
    "only a qform": _odd(header={"sform_code": 0, "qform_code": 1}),
    # NIfTI then has the first axis run to the left, and the origin in the centre
    "no affine (sform and qform unknown)": _odd(
        to_world=affine(origin=(-19.5, -17.5, -5)), axcodes="LAS", header={"sform_code": 0, "qform_code": 0}
    ),
    "sform and qform disagree": _odd(header={**_QFORM, "qoffset_x": -13, "qoffset_y": -18, "qoffset_z": 5}),
    "pixdim agrees with the qform only": _odd(header={**_QFORM, "pixdim": [1, 3, 3, 3, 0, 0, 0, 0]}),
    "name with spaces and other letters": _odd(name="Größe 脳 (été) sub 01.nii.gz"),
    "name that looks like code": _odd(name="$(touch pwned) @scale %x::y#1 __import__('os').nii.gz"),
    "DICOM: RLE": _odd_dicom("RLE"),
    "DICOM: JPEG lossless": _odd_dicom("JPEG"),
    "DICOM: JPEG 2000": _odd_dicom("JPEG2000"),
    "DICOM: deflated": _odd_slices(_deflate),
    "DICOM: another RescaleSlope in each slice": _odd_slices(_rescale, head() * (0.5 + np.arange(6) / 2) - 10),
    "DICOM: enhanced, oblique, from above": _enhanced,
}
