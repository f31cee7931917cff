"""MONAI Label app: super-resolves the scans of a folder for a viewer, and fine-tunes the network on them (docs/monai_label.md).

As a script it starts the server, on the loopback address unless ``--host`` is given. The options are those of ``monailabel start_server``.
"""

from __future__ import annotations

import csv
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the bundle may be unpacked without being installed
os.environ.setdefault("MONAI_LABEL_DATASTORE_FILE_EXT", '["*.nii.gz", "*.nii", "*.nrrd", "*.mha"]')  # read on import

import itk
import nibabel as nib
import torch
from fastapi import HTTPException
from monai.bundle import ConfigParser, run
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.main import Main
from monailabel.utils.others.generic import device_list, device_map, file_checksum, name_to_device

from bundle.errors import InputError, reason, switch
from bundle.files import write_atomically
from bundle.ranges import read_ranges
from bundle.subjects import find_volumes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
METADATA = json.loads((CONFIGS / "metadata.json").read_text())
NAME = "super_resolution"  # of the model, its trainer, the strategy, and the settings stored with a result
FORMATS = (".nii.gz", ".nii", ".nrrd", ".mha", ".zip")  # the last one: a DICOM series

logger = logging.getLogger(__name__)


class SuperResolutionApp(MONAILabelApp):
    """The app that the server loads.

    ``--conf network NAME`` replaces the default network: ``isotropic``, for thick slices; ``any_factor``; or a compared network of
    ``configs/networks``.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        network = conf.get("network")
        known = {path.stem: path for path in sorted((CONFIGS / "networks").glob("*.json"))}
        known |= {name: CONFIGS / f"{name}.json" for name in ("any_factor", "isotropic")}
        if network is not None and network not in known:
            raise InputError(f"network must be one of {', '.join(known)}, got {network!r}")
        overlays = [known[network]] if network else []
        self.fine_tuned = Path(app_dir) / "model" / (f"fine_tuned_{network}.pt" if network else "fine_tuned.pt")
        self.task = SuperResolution(overlays, self.fine_tuned)
        texts = {key: METADATA[key] for key in ("name", "description", "version")}
        super().__init__(app_dir, studies, conf, **texts)

    def init_infers(self) -> dict[str, InferTask]:
        return {NAME: self.task}

    def init_trainers(self) -> dict[str, TrainTask]:
        return {NAME: FineTuning(self.task, self.fine_tuned)} if self.task.needs_weights else {}

    def init_strategies(self) -> dict[str, Strategy]:
        return {NAME: NextResult(self.task)}

    def init_batch_infer(self) -> Callable:
        return AllResults(self.task)

    def info(self) -> dict:
        """As in MONAI Label, but every scan counts as labelled, because it is its own target: Slicer trains only on labelled scans."""
        info = super().info()
        info["datastore"]["total"] = info["datastore"]["completed"] = len(scans(self.datastore()))
        return info

    def infer(self, request: dict, datastore: Datastore | None = None) -> dict:
        """As in MONAI Label, but with an error that names an image that does not exist."""
        image = request.get("image")
        if not os.path.exists(image) and image not in (datastore or self.datastore()).list_images():
            raise HTTPException(404, f"{image}: no such image")
        return super().infer(request, datastore)


class SuperResolution(InferTask):
    """Run ``configs/inference.json``, so that viewers get the same results as the command line.

    Args:
        overlays: configs that choose another network.
        fine_tuned: weights that replace the published ones if the file exists.
    """

    def __init__(self, overlays: Sequence[Path], fine_tuned: Path) -> None:
        parser = ConfigParser()
        parser.read_config([str(CONFIGS / "inference.json"), *map(str, overlays)])
        self.overlays, self.fine_tuned = [str(path) for path in overlays], fine_tuned
        if parser.get_parsed_content("facts"):
            name = "thick_slices" if "isotropic" in (path.stem for path in overlays) else "general"
            self.training_overlays = [str(CONFIGS / f"{n}.json") for n in (name, "random_acquisitions")]
            self.degradation = "kspace"
        else:
            self.training_overlays, self.degradation = self.overlays, parser.get_parsed_content("degradation")
        self.published = Path(parser.get_parsed_content("checkpoint"))
        self.needs_weights = bool(parser.get_parsed_content("load_weights"))
        self.default_scale = parser.get_parsed_content("scale")  # None if the factors follow from the spacing
        factors = read_ranges(parser.get_parsed_content("training_ranges")).get("factor_x")
        # viewers load the result of a segmentation task as an 8-bit mask
        menu = {} if self.default_scale is None else {"scale": menu_of(self.default_scale, factors)}
        config = {"device": device_list(), **menu, "spacing": "", "axial_slices": ""}
        super().__init__(InferType.OTHERS, {}, 3, METADATA["description"], config)

    def is_valid(self) -> bool:
        return not self.needs_weights or self.get_path() is not None

    def get_path(self, validate: bool = True) -> str | None:
        weights = (self.fine_tuned, self.published) if self.needs_weights else ()
        return next((str(path) for path in weights if path.exists()), None)

    def options_of(self, request: dict) -> dict[str, Any]:
        """Settings of ``configs/inference.json`` that a request may set. Strings of a request must not reach the config: they can be
        code."""
        options = {"spacing": numbers_of(request, "spacing", None, 0.2, 4), "axial_slices": slices_of(request)}
        if self.default_scale is None:
            if request.get("scale"):
                raise InputError("scale does not apply to thick slices: spacing says how large the voxels become, in mm")
            return options
        return {"scale": numbers_of(request, "scale", self.default_scale, 1, 4), **options}

    def __call__(self, request: dict) -> tuple[str, dict]:
        """Super-resolve ``request["image"]``, a file or DICOM folder.

        Returns:
            file of the result in the format ``request["result_extension"]``, always float32 (``".zip"`` is a DICOM series, for scans that
            came as DICOM), or with ``request["uncertainty"]`` of its uncertainty map; and options.

        Raises:
            HTTPException: with the reason in one line.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                extension = request.get("result_extension") or ".nii.gz"
                if extension not in FORMATS:
                    raise InputError(f"result_extension must be one of {', '.join(FORMATS)}, got {extension!r}")
                volumes = find_volumes(os.path.abspath(request["image"]))
                if len(volumes) > 1:
                    raise InputError(f"{request['image']}: one volume expected, found {len(volumes)}")
                options = self.options_of(request)
                uncertainty = switch("uncertainty", request.get("uncertainty") or False)
                if uncertainty and extension == ".zip":
                    raise InputError("an uncertainty map is not DICOM: result_extension .zip and uncertainty cannot be combined")
                if self.get_path() is not None:
                    options["checkpoint"] = self.get_path()
                notes = BufferingHandler(sys.maxsize)
                logging.getLogger("bundle").addHandler(notes)
                try:
                    run(
                        config_file=[str(CONFIGS / "inference.json"), *self.overlays],
                        meta_file=str(CONFIGS / "metadata.json"),
                        logging_file=False,  # keep the server's logging
                        dataset_dir=volumes[0],
                        output_dir=folder,
                        device=device_of(request),
                        dicom=extension == ".zip",
                        uncertainty=uncertainty,
                        **options,
                    )
                finally:
                    logging.getLogger("bundle").removeHandler(notes)
                options.pop("checkpoint", None)
                result = next(Path(folder).rglob("*_sr.nii.gz"), None)
                if result is None:  # the volume was skipped, and only the log has the reason
                    lines = (record.getMessage() for record in notes.buffer)
                    prefix = f"skipped: {volumes[0]}"
                    raise InputError(next((line for line in lines if line.startswith(prefix)), prefix))
                (report,) = Path(folder).rglob("*_sr.json")
                warnings = json.loads(report.read_text(encoding="utf-8"))["warnings"]
                if uncertainty:
                    (result,), options["uncertainty"] = Path(folder).rglob("*_sd.nii.gz"), True
                file = zipped(Path(folder), request["image"]) if extension == ".zip" else converted(result, extension)
                return file, {"label_names": {}, **options, "warnings": warnings}
            except Exception as e:
                raise HTTPException(422, failure_in(folder) or reason(e)) from e

    def note(self, request: dict) -> dict:
        """Weights and settings of a result, for the datastore.

        Raises:
            HTTPException: if an option of the request is not allowed.
        """
        try:
            weights = self.get_path()
            return {"weights": file_checksum(weights) if weights else None, **self.options_of(request)}
        except InputError as e:
            raise HTTPException(422, str(e)) from e

    def add_result(self, scan: str, note: dict, request: dict, datastore: Datastore) -> str:
        """Identifier of a scan's result in the datastore, which is computed unless there is one with the same ``note``."""
        name = f"{scan}_sr"
        old_note = datastore.get_image_info(name).get(NAME)
        if old_note is None and name in datastore.list_images():
            raise HTTPException(422, f"{datastore.get_image_uri(name)} was not made by this server: it is not overwritten")
        if old_note != note:
            file, answer = self({**request, "image": datastore.get_image_uri(scan), "result_extension": ".nii.gz", "uncertainty": False})
            try:
                datastore.add_image(name, file, {NAME: note, "warnings": answer["warnings"]})
            except OSError as e:
                raise HTTPException(422, f"{name}: cannot be written ({e.strerror})") from e
            finally:
                os.unlink(file)
        return name


class NextResult(Strategy):
    """*Next Sample*: open the result of the newest scan whose result was not opened yet. Viewers load it as a volume, like every image of
    the datastore, whereas they load the response of an inference as a mask.

    Args:
        task: computes the results.
    """

    def __init__(self, task: SuperResolution) -> None:
        super().__init__("Super-resolve the next scan and open the result")
        self.task = task

    def info(self) -> dict:
        return {**super().info(), "config": self.task.config()}

    def __call__(self, request: dict, datastore: Datastore) -> dict:
        """
        Raises:
            HTTPException: if no result is left to open and scans failed, with the first reason.
        """
        note, failures = self.task.note(request), []
        for scan in scans(datastore):
            try:
                result = self.task.add_result(scan, note, request, datastore)
            except HTTPException as e:
                logger.error("failed: %s", e.detail)
                failures.append(e.detail)
                continue
            if "strategy" not in datastore.get_image_info(result):  # MONAI Label sets it when an image is opened
                return {"id": result, "warnings": datastore.get_image_info(result).get("warnings", [])}
        if failures:
            more = f"; and {len(failures) - 1} more, see the server's log" if len(failures) > 1 else ""
            raise HTTPException(422, failures[0] + more)
        return {}


class AllResults(BatchInferTask):
    """Super-resolve every scan in the background, so that *Next Sample* only opens the results.

    Args:
        task: computes the results.
    """

    def __init__(self, task: SuperResolution) -> None:
        self.task = task

    def __call__(self, request: dict, datastore: Datastore, infer: Callable) -> dict[str, str]:
        """Identifier of each scan's result, or the reason why there is none."""
        note, results = self.task.note(request), {}
        for scan in scans(datastore):
            try:
                results[scan] = self.task.add_result(scan, note, request, datastore)
            except HTTPException as e:
                logger.error("failed: %s", e.detail)
                results[scan] = f"failed: {e.detail}"
        return results


class FineTuning(TrainTask):
    """Run ``configs/train.json`` on the scans, each its own target, starting from the weights in use. The general network is trained on
    random acquisitions, a compared network as before.

    Args:
        task: provides the weights in use.
        fine_tuned: path of the new weights, which are saved if they are better than the old ones on the held-out scans.
    """

    def __init__(self, task: SuperResolution, fine_tuned: Path) -> None:
        super().__init__("Fine-tune on the scans of the datastore, without labels")
        self.task, self.fine_tuned = task, fine_tuned

    def config(self) -> dict:
        return {"device": device_list(), "max_epochs": 10, "learning_rate": 1e-4, "val_split": 0.2}

    def __call__(self, request: dict, datastore: Datastore) -> dict:
        """
        Raises:
            InputError: if an option is not allowed, or there are too few scans.
        """
        options = {key: type(value)(request.get(key, value)) for key, value in self.config().items() if key != "device"}
        if options["max_epochs"] < 1 or options["learning_rate"] <= 0 or not 0 < options["val_split"] < 1:
            raise InputError(f"max_epochs and learning_rate must be positive, val_split between 0 and 1, got {options}")
        volumes = [{"image": datastore.get_image_uri(scan)} for scan in sorted(scans(datastore))]
        held_out = max(1, round(options["val_split"] * len(volumes)))
        if len(volumes) <= held_out:
            raise InputError(f"{len(volumes)} scans: at least one is needed to train on and {held_out} to validate")

        folder = self.fine_tuned.with_name("fine_tuning")
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier run
        run(
            config_file=[str(CONFIGS / "train.json"), *self.task.training_overlays],
            meta_file=str(CONFIGS / "metadata.json"),
            logging_file=str(CONFIGS / "logging.conf"),
            output_dir=str(folder),
            train_datalist=volumes[:-held_out],
            val_datalist=volumes[-held_out:],
            max_epochs=options["max_epochs"],
            learning_rate=options["learning_rate"],
            initial_checkpoint=self.task.get_path(),
            val_interval=1,
            degradation=self.task.degradation,
            device=device_of(request),
            validate_at_start=True,  # so that only weights better than the start are kept
        )
        better = folder / "models" / "model.pt"
        if better.exists():
            write_atomically(self.fine_tuned, lambda part: shutil.copyfile(better, part))
            logger.info("better than before on the held-out scans: inference uses %s from now on", self.fine_tuned)
        else:
            logger.info("no epoch was better than the start on the held-out scans: the weights stay as they are")
        return {}


def scans(datastore: Datastore) -> list[str]:
    """Images of the datastore that are not results, newest first."""
    images = {name: datastore.get_image_info(name) for name in datastore.list_images()}
    results = {f"{name}_sr" for name in images} | {name for name, info in images.items() if NAME in info}
    return sorted(images.keys() - results, key=lambda name: (-images[name].get("ts", 0), name))


def menu_of(default: float, factors: Sequence[float] | None) -> list[str]:
    """Factors that a viewer offers, the default first, within the range for which the weights are trained."""
    low, high = factors or (default, default)
    return [f"{factor:g}" for factor in sorted({default, 1.5, 2, 2.5, 3, 4}, key=lambda f: (f != default, f)) if low <= factor <= high]


def slices_of(request: dict) -> list[int] | None:
    """First and last axial slice of a request, ``None`` for all."""
    given = request.get("axial_slices") or None
    try:
        return given and [int(n) for n in (json.loads(given) if isinstance(given, str) else given)]
    except (TypeError, ValueError) as e:
        raise InputError(f"axial_slices must be like [90, 97], got {given!r}") from e


def numbers_of(request: dict, name: str, default: float | None, low: float, high: float) -> float | list[float] | None:
    """A number from a request, or two like ``"[2, 3]"``, for x and y."""
    given = request.get(name) or default
    try:
        value = json.loads(given) if isinstance(given, str) else given
        pair = value if isinstance(value, list) else [value, value]
        if value is None or (len(pair) == 2 and all(type(v) in (int, float) and low <= v <= high for v in pair)):
            return value
    except ValueError:
        pass
    raise InputError(f"{name} must be a number from {low} to {high}, or two like [2, 3], got {given!r}")


def device_of(request: dict) -> torch.device:
    """Device that a request names or numbers; by default the first GPU, or the CPU if there is none."""
    name = name_to_device(request.get("device"))
    if name not in ("cpu", "cuda", *device_map().values()):
        raise InputError(f"no such device: {name!r}, there are {', '.join(device_list())}")
    return torch.device(name)


def failure_in(folder: str) -> str | None:
    """Reason of the failure, from ``failed.csv``; ``None`` without that file."""
    path = Path(folder) / "failed.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as stream:
        return next(csv.DictReader(stream))["reason"]


def zipped(folder: Path, image: str) -> str:
    """Temporary zip file with the DICOM series that a run wrote into a folder.

    Raises:
        InputError: if it wrote none.
    """
    series = next(folder.rglob("*_sr_dicom"), None)
    if series is None:
        raise InputError(f"{image}: result_extension .zip is for DICOM of MR, which this is not")
    handle, file = tempfile.mkstemp(suffix=".zip")
    os.close(handle)
    return shutil.make_archive(file.removesuffix(".zip"), "zip", series)


def converted(volume: Path, extension: str) -> str:
    """Temporary file with a NIfTI volume in another format."""
    copy = volume.with_name(f"copy{extension}")
    if extension == ".nii.gz":
        volume.rename(copy)
    elif extension == ".nii":
        nib.save(nib.load(volume), copy)
    else:
        itk.imwrite(itk.imread(volume), copy)
    handle, file = tempfile.mkstemp(suffix=extension)
    os.close(handle)
    return shutil.move(copy, file)


if __name__ == "__main__":
    settings.MONAI_LABEL_CORS_ORIGINS = ["http://127.0.0.1"]  # other web pages in the browser must not read the scans
    importlib.import_module("monailabel.app")
    settings.MONAI_LABEL_CORS_ORIGINS = []  # MONAI Label cannot serialise this setting for its processes
    sys.argv[1:] = ["start_server", "--app", str(Path(__file__).parent), "--host", "127.0.0.1", *sys.argv[1:]]
    Main().run()
