"""MedMNIST archives -> NIfTI files and a table."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from trainables.data.scans import write_nifti
from trainables.data.volumes import CohortError, new_folder


def import_medmnist(archive: Path, folder: Path, limit: int | None = None) -> Path:
    """Write a MedMNIST 3D archive as NIfTI files with its official split; returns the path of the table.

    archive: .npz with {train,val,test}_images (N, D, H, W) and {train,val,test}_labels (N,) or (N, 1).
    folder: gets `table.csv` (path, label, subject, split; one subject a volume, as MedMNIST names none) and `volumes/`,
    1 mm voxels in RAS+. It appears only when it is complete. limit: volumes of each split, the first ones.

    Raises CohortError: not such an archive, or `folder` holds something already.
    """
    parts = _medmnist_parts(archive, limit)
    with new_folder(folder) as target:
        (target / "volumes").mkdir()
        lines = ["path,label,subject,split"]
        for split, (images, labels) in parts.items():
            for row, (voxels, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{split}_{row:05d}"
                write_nifti(target / "volumes" / f"{name}.nii.gz", voxels, np.eye(4))
                lines.append(f"volumes/{name}.nii.gz,{label},{name},{split}")
        (target / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "table.csv"


def _medmnist_parts(archive: Path, limit: int | None) -> dict[str, tuple[np.ndarray, list[int]]]:
    problems = []
    parts = {}
    try:
        arrays = np.load(archive, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive of arrays")
        with arrays:
            for split in ("train", "val", "test"):
                names = (f"{split}_images", f"{split}_labels")
                missing = [name for name in names if name not in arrays.files]
                if missing:
                    problems.append(
                        f"{archive}: no {' and no '.join(missing)}; it holds {', '.join(arrays.files) or 'nothing'}"
                    )
                    continue
                images, labels = (arrays[name][:limit] for name in names)
                problem = _medmnist_problem(images, labels)
                if problem:
                    problems.append(f"{archive}: {split}: {problem}")
                else:
                    stored = images.astype(np.uint8) if images.dtype == bool else images
                    parts[split] = stored, labels.reshape(-1).tolist()
    except FileNotFoundError:
        raise CohortError(f"{archive}: no such file") from None
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise CohortError(f"{archive}: not a MedMNIST archive (.npz): {error}") from None
    if problems:
        raise CohortError(problems)
    return parts


def _medmnist_problem(images: np.ndarray, labels: np.ndarray) -> str | None:
    if images.ndim != 4:
        return f"images of shape {images.shape}: (N, D, H, W) is needed, a 3D archive"
    if images.dtype not in (bool, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64):
        return (
            f"images of type {images.dtype}: bool, integers of up to 32 bits or floats are needed"
        )
    if labels.size != len(labels) or len(labels) != len(images):
        return (
            f"labels of shape {labels.shape} for {len(images)} images: one label an image is needed"
        )
    if labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        return f"labels of type {labels.dtype}: whole numbers from 0 are needed"
    return None
