"""Unit test for ci/unit_tests of the MONAI Model Zoo: every config runs on toy data. Started from the root of the zoo."""

import os
import shutil
import sys
import tempfile
import unittest

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow

BUNDLE_ROOT = os.path.join("models", "brain_mri_super_resolution")
SMALL_NETWORK = {"network_def::features": 4, "network_def::num_modules": 1}
SMALL_GENERAL = {"network_def::features": 4, "network_def::num_blocks": 1}
TRAIN = {
    **SMALL_NETWORK,
    "split": [2, 1, 1],
    "patch_size": 15,
    "patches_per_volume": 8,
    "batch_size": 8,
    "max_epochs": 1,
    "val_interval": 1,
}


class TestBrainMRISuperResolution(unittest.TestCase):
    def setUp(self):
        sys.path.insert(0, BUNDLE_ROOT)
        self.folder = tempfile.mkdtemp()
        self.dataset_dir = os.path.join(self.folder, "data")
        self.output_dir = os.path.join(self.folder, "output")
        os.makedirs(self.dataset_dir)
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 4)), indexing="ij")
        for n in range(4):
            volume = 1000 * np.clip(1 - x**2 - y**2, 0, 1) * (1 + 0.2 * np.sin((n + 4) * x) + 0.1 * z)
            nib.Nifti1Image(volume.astype(np.float32), np.eye(4)).to_filename(os.path.join(self.dataset_dir, f"sub-{n}.nii.gz"))

    def tearDown(self):
        shutil.rmtree(self.folder)
        sys.path.remove(BUNDLE_ROOT)

    def run_workflow(self, workflow_type, *configs, **override):
        workflow = ConfigWorkflow(
            workflow_type=workflow_type,
            config_file=[os.path.join(BUNDLE_ROOT, "configs", f"{name}.json") for name in configs],
            logging_file=os.path.join(BUNDLE_ROOT, "configs", "logging.conf"),
            meta_file=os.path.join(BUNDLE_ROOT, "configs", "metadata.json"),
            bundle_root=BUNDLE_ROOT,
            output_dir=self.output_dir,
            **override,
        )
        workflow.initialize()
        self.assertEqual(workflow.check_properties(), [])
        workflow.run()
        workflow.finalize()

    def test_train_eval_config(self):
        self.run_workflow("train", "train", dataset_dir=self.dataset_dir, **TRAIN)
        checkpoint = os.path.join(self.output_dir, "models", "model.pt")
        self.assertTrue(os.path.isfile(checkpoint))
        self.run_workflow("train", "train", "evaluate", dataset_dir=self.dataset_dir, checkpoint=checkpoint, **TRAIN)
        self.assertTrue(os.path.isfile(os.path.join(self.output_dir, "summary.json")))

    def test_infer_config(self):
        scan = os.path.join(self.dataset_dir, "sub-0.nii.gz")
        # an untrained network: do not load weights
        self.run_workflow("infer", "inference", dataset_dir=scan, load_weights=False, **SMALL_GENERAL)
        self.assertEqual(nib.load(os.path.join(self.output_dir, "sub-0_sr.nii.gz")).shape, (80, 72, 4))


if __name__ == "__main__":
    unittest.main()
