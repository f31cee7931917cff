"""A result as a DICOM series, derived from the series of the input."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from pydicom import DataElement, config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import DSfloat, validate_value

from . import version
from .dicom import Slice, header_of, slices_of
from .dicom_volume import TO_RAS, write_file
from .errors import InputError
from .headers import RESULT_MARK
from .results import DICOM_ENDING, Results

__all__ = ["SaveDicomd", "derived_series", "write_folder"]

NAME = "brain_mri_super_resolution"
LARGEST = 32767  # largest signed value of 16 bits
FINE_ENOUGH = 1000  # number of whole steps up to the largest magnitude

# Elements of the source that also apply to the result, by module of the standard. Nothing else is copied: no private elements, nothing
# about the source's pixels.
PATIENT = (
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight OtherPatientIDs "
    "PregnancyStatus PatientSpeciesDescription PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence"
)
STUDY = "StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName StudyDescription"
SERIES = "PatientPosition BodyPartExamined Laterality ProtocolName SeriesDate SeriesTime FrameOfReferenceUID PositionReferenceIndicator"
EQUIPMENT = "Manufacturer ManufacturerModelName InstitutionName StationName DeviceSerialNumber SoftwareVersions"
ACQUISITION = (
    "AcquisitionDate AcquisitionTime AcquisitionNumber ScanningSequence SequenceVariant ScanOptions MRAcquisitionType SequenceName "
    "RepetitionTime EchoTime EchoNumbers EchoTrainLength InversionTime FlipAngle NumberOfAverages MagneticFieldStrength ImagedNucleus "
    "ImagingFrequency ContrastBolusAgent LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod"
)
COPIED = f"SpecificCharacterSet TimezoneOffsetFromUTC {PATIENT} {STUDY} {SERIES} {EQUIPMENT} {ACQUISITION}".split()
# required by the standard, even if empty; an unknown sequence counts as research mode (RM)
EMPTY = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName Manufacturer "
    "PatientPosition PositionReferenceIndicator ScanOptions MRAcquisitionType RepetitionTime EchoTime EchoTrainLength"
)
REQUIRED: dict[str, str | None] = dict.fromkeys(EMPTY.split()) | {
    "ScanningSequence": "RM",
    "SequenceVariant": "NONE",
    "BodyPartExamined": "BRAIN",
}

IDENTITY = "SpecificCharacterSet PatientName PatientID StudyInstanceUID StudyID AccessionNumber FrameOfReferenceUID"  # even if invalid

logger = logging.getLogger(__name__)


class SaveDicomd(MapTransform):
    """Write a volume that came as DICOM also as a series: ``<name>_sr_dicom/``, one file per slice. The folder is written atomically.

    Args:
        keys: volumes (1, X, Y, Z) in the orientation and the units of the input, see :func:`bundle.dicom_volume.load_series`.
        results: results of the run. If they include no DICOM, the series of an earlier result is removed.
    """

    def __init__(self, keys: KeysCollection, results: Results) -> None:
        super().__init__(keys)
        self.results = results

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> Mapping:
        for key in self.keys:
            image = data[key]
            name = str(image.meta["filename_or_obj"])
            folder = self.results.path(name, DICOM_ENDING)
            if not self.results.dicom:
                _remove(folder)
            elif "dicom_slices" not in image.meta:
                logger.warning("%s: not DICOM, so no DICOM is written: there is no patient and no study for it", name)
            elif image.meta.get("modality") != "MR":
                logger.warning("%s: no DICOM is written, its modality is %s and not MR", name, image.meta.get("modality") or "unknown")
            else:
                write_folder(folder, partial(_write, derived_series(image, self.results.settings)))
        return data


def derived_series(image: MetaTensor, settings: dict) -> list[Dataset]:
    """Datasets of a series of MR images, one for each plane along the last axis of a volume.

    Args:
        image: (1, X, Y, Z) with its affine; ``meta`` is that of :func:`bundle.dicom_volume.load_series`.
        settings: settings of the run: the same input and settings give the same UIDs.

    Returns:
        Datasets with the patient, study and frame of reference of the source. Stored values times RescaleSlope agree with the volume to
        half a RescaleSlope: 0.5 if the largest magnitude is from 1000 to 32767, else 1/65534 of the largest magnitude.
    """
    sources = [slices_of(file)[0][frame or 0] for file, frame in json.loads(image.meta["dicom_slices"])]
    common = _common(sources[0], image, settings, [s.uid for s in sources])
    volume = image.as_tensor()[0].float().cpu().numpy()
    to_lps = TO_RAS @ np.asarray(image.affine, dtype=np.float64)
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    common.ImageOrientationPatient = _decimals([*(to_lps[:3, 0] / spacing[0]), *(to_lps[:3, 1] / spacing[1])])
    common.PixelSpacing = _decimals([spacing[1], spacing[0]])
    same_slices = abs(spacing[2] - float(image.meta["slice_spacing"])) < 1e-3 * spacing[2]
    thickness = float(image.meta.get("slice_thickness", 0)) if same_slices else 0.0
    common.SliceThickness, common.SpacingBetweenSlices = _decimals([thickness or spacing[2], spacing[2]])
    common.Rows, common.Columns = volume.shape[1], volume.shape[0]
    slope = _slope(float(np.abs(volume).max()))
    common.RescaleIntercept, common.RescaleSlope, common.RescaleType = "0", DSfloat(slope, auto_format=True), "US"
    low, high = np.percentile(volume, (0.5, 99.5))
    common.WindowCenter, common.WindowWidth = _decimals([(low + high) / 2, max(high - low, slope)])
    common.VOILUTFunction = "LINEAR_EXACT"  # allows a window narrower than 1
    normal = to_lps[:3, 2] / spacing[2]
    places = np.asarray([s.position for s in sources]) @ normal
    series = []
    for k in range(volume.shape[2]):
        ds = Dataset()
        ds.update(common)
        position = to_lps[:3, 3] + k * to_lps[:3, 2]
        ds.ImagePositionPatient = _decimals(position)
        ds.SOPInstanceUID, ds.InstanceNumber = _uid(common.SeriesInstanceUID, k), k + 1
        distances = np.abs(places - position @ normal)
        near = np.flatnonzero(distances < max(distances.min(), float(image.meta["slice_spacing"]) - 1e-3) + 1e-6)
        if all(s.uid for s in sources):
            ds.SourceImageSequence = [_reference(sources[n]) for n in near]
        ds.PixelData = np.rint(volume[..., k].T / slope).astype("<i2").tobytes()
        series.append(ds)
    return series


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary folder)`` and rename the result to ``folder``, so that it is always complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".part-{os.getpid()}-{folder.name}")
    parts = (p for p in folder.parent.glob(".part-*") if re.fullmatch(rf"\.part-\d+-{re.escape(folder.name)}", p.name))
    for left in [part, *parts]:  # from killed processes
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir()
        write(part)
        for file in part.iterdir():
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        _remove(folder)
        if folder.exists():
            raise InputError(f"{folder}: in the way, and not of this program: move it elsewhere")
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(series: Sequence[Dataset], folder: Path) -> None:
    for number, ds in enumerate(series, 1):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta = meta
        write_file(folder / f"{number:04d}.dcm", ds)


def _remove(folder: Path) -> None:
    """Remove the series of an earlier result, but no other files."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for file in folder.glob("[0-9]*.dcm"):
        if any(s.result for s in slices_of(file)[0]):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _common(source: Slice, image: MetaTensor, settings: dict, uids: Sequence[str]) -> Dataset:
    """Elements that all files of a series share, from the header of a source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values of the source that do not follow the standard
        header = header_of(source.file)
        ds = Dataset()
        for key in COPIED:
            if key in header and (key in IDENTITY.split() or _is_valid(header[key])):
                ds[key] = header[key]
    _add_acquisition(ds, header)
    for key, value in REQUIRED.items():
        if key not in ds or (value and not ds[key].VM):
            setattr(ds, key, value)
    if "Laterality" not in ds and ds.BodyPartExamined not in ("BRAIN", "HEAD", "SKULL"):
        ds.Laterality = ""  # required for body parts that may be paired
    image_type = header.get("ImageType") or []
    kind = [value for value in ([image_type] if isinstance(image_type, str) else image_type)[2:] if value and value != "MOSAIC"]
    ds.ImageType = ["DERIVED", "SECONDARY", *(kind or ["OTHER"])]
    ds.SOPClassUID, ds.Modality = MRImageStorage, "MR"
    ds.StudyInstanceUID = header.get("StudyInstanceUID") or _uid("study", *uids)
    ds.FrameOfReferenceUID = header.get("FrameOfReferenceUID") or _uid("frame", *uids)
    ds.SeriesInstanceUID = _uid(source.series, *uids, source.component, json.dumps(settings, sort_keys=True), version())
    ds.SeriesNumber = 1000 + int(header.get("SeriesNumber") or 0)
    ds.SeriesDescription = f"{NAME} {version()}: {header.get('SeriesDescription', '')}"[:64].rstrip(" :")
    factors = " x ".join(f"{float(f):g}" for f in image.meta.get("factor", []))
    ds.DerivationDescription = (
        f"{RESULT_MARK} {version()}, factors {factors or 'unknown'}. "
        "The detail that the network adds is an estimate, not a measurement. Not for diagnosis."
    )
    ds.DerivationCodeSequence = [_code("SpatialResampling")]
    ds.BurnedInAnnotation = "NO"
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = [_code("ProcessingEquipment")]
    equipment.Manufacturer, equipment.ManufacturerModelName, equipment.SoftwareVersions = NAME, NAME, version()
    equipment.ContributionDescription = "Super-resolution by a neural network"
    ds.ContributingEquipmentSequence = [equipment]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    return ds


def _is_valid(element: DataElement) -> bool:
    """Whether an element has values that the standard allows, so that errors of the source are not copied."""
    values = element.value if element.VM > 1 else [element.value]
    try:
        for value in values if element.VR != "SQ" else []:
            validate_value(element.VR, str(value), config.RAISE)
    except ValueError:
        return False
    return element.VM > 0


def _add_acquisition(ds: Dataset, header: Dataset) -> None:
    """Add the times and the flip angle from the groups of an enhanced source, under the names that single-slice files use."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frame = (header.get("PerFrameFunctionalGroupsSequence") or [Dataset()])[0]

    def get(group: str, key: str) -> Any:
        return ((frame.get(group) or shared.get(group) or [Dataset()])[0]).get(key)

    found = {
        "EchoTime": get("MREchoSequence", "EffectiveEchoTime"),
        "RepetitionTime": get("MRTimingAndRelatedParametersSequence", "RepetitionTime"),
        "FlipAngle": get("MRTimingAndRelatedParametersSequence", "FlipAngle"),
        "EchoTrainLength": get("MRTimingAndRelatedParametersSequence", "EchoTrainLength"),
    }
    for key, value in found.items():
        if value is not None and key not in ds:
            setattr(ds, key, DSfloat(value, auto_format=True) if key != "EchoTrainLength" else value)


def _slope(largest: float) -> float:
    """RescaleSlope: 1 if that is fine enough, because many viewers expect 1 for MR."""
    if FINE_ENOUGH <= largest <= LARGEST:
        return 1.0
    return float(f"{max(largest / LARGEST, 1e-12) * (1 + 1e-6):.7g}")  # rounded up: a decimal that a header can hold


def _reference(source: Slice) -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = source.sop_class, source.uid
    if source.frame is not None and not source.tiles:
        ds.ReferencedFrameNumber = source.frame + 1
    ds.PurposeOfReferenceCodeSequence = [_code("SourceImageForImageProcessingOperation")]
    return ds


def _code(keyword: str) -> Dataset:
    """A code of DICOM's own scheme."""
    from pydicom.sr.codedict import codes  # imported here because it takes a tenth of a second

    code, ds = getattr(codes.DCM, keyword), Dataset()
    ds.CodeValue, ds.CodingSchemeDesignator, ds.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return ds


def _uid(*words: Any) -> str:
    """A reproducible UID derived from a UUID of the words."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def _decimals(numbers: Sequence[float] | np.ndarray) -> list[DSfloat]:
    """Numbers as text of at most 16 characters."""
    return [DSfloat(float(number), auto_format=True) for number in numbers]
