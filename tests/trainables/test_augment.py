import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Affine
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainables.augment import affine_batch, augment_batch, flip_batch


def smooth_volume(shape: tuple[int, int, int] = (12, 20, 15), seed: int = 0) -> Tensor:
    """(1, 1, D, H, W), smooth enough that interpolation in other orders differs little."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(gaussian_filter(noise, 1.5)).float()[None, None]


def generator(*numbers: int) -> torch.Generator:
    """Seeded as a training loop does it: again for each (seed, epoch, step)."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator().manual_seed(int(seed))


def unchanged(num: int = 1) -> dict[str, Any]:
    return {
        "angles_B3": torch.zeros(num, 3),
        "scale_B": torch.ones(num),
        "shift_B3": torch.zeros(num, 3),
    }


def scipy_affine(
    volume: Tensor,
    angles: Sequence[float],
    scale: float,
    shift: Sequence[float],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
    """The same change in float64, in millimetres: read each output voxel at R^-1 (x - shift) / scale."""
    array = volume[0, 0].double().numpy()
    sides, size = np.array(array.shape), np.array(spacing)
    matrix = (
        np.diag(1 / size) @ Rotation.from_euler("XYZ", angles).as_matrix().T @ np.diag(size) / scale
    )
    center = (sides - 1) / 2
    offset = center - matrix @ (center + np.array(shift) * sides)
    return affine_transform(array, matrix, offset=offset, order=1, mode="nearest")


# The affine


@pytest.mark.parametrize(
    ("angles", "scale", "shift"),
    [
        ((0.0, 0.0, 0.0), 1.0, (0.0, 0.0, 0.0)),
        ((0.3, 0.0, 0.0), 1.0, (0.0, 0.0, 0.0)),
        ((0.0, -0.25, 0.0), 1.0, (0.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.4), 1.0, (0.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), 1.1, (0.05, -0.02, 0.04)),
        ((0.2, -0.3, 0.25), 0.9, (-0.05, 0.03, 0.01)),
    ],
)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 0.8)])
def test_the_affine_is_that_of_scipy_on_a_volume_that_is_no_cube(
    angles: tuple[float, float, float],
    scale: float,
    shift: tuple[float, float, float],
    spacing: tuple[float, float, float],
) -> None:
    volume = smooth_volume()
    ours = affine_batch(
        volume,
        angles_B3=torch.tensor([angles]),
        scale_B=torch.tensor([scale]),
        shift_B3=torch.tensor([shift]),
        spacing=spacing,
    )
    np.testing.assert_allclose(
        ours[0, 0], scipy_affine(volume, angles, scale, shift, spacing), atol=2e-5
    )


@pytest.mark.parametrize(
    "angles", [(0.3, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3), (0.2, -0.15, 0.25)]
)
def test_a_rotation_is_that_of_monai(angles: tuple[float, float, float]) -> None:
    volume = smooth_volume()
    ours = affine_batch(volume, **unchanged() | {"angles_B3": torch.tensor([angles])})
    # MONAI's matrix is the one it reads with: the rotation back
    back = Rotation.from_euler("XYZ", angles).inv().as_euler("XYZ")
    monai = Affine(rotate_params=tuple(back), padding_mode="border", image_only=True)(volume[0])
    torch.testing.assert_close(ours[0], monai.as_tensor(), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_a_positive_quarter_turn_leads_each_axis_to_the_next(
    axis: int, plane: tuple[int, int]
) -> None:
    volume = torch.randn(1, 1, 9, 9, 9)
    angles = torch.zeros(1, 3)
    angles[0, axis] = math.pi / 2
    ours = affine_batch(volume, **unchanged() | {"angles_B3": angles})
    turned = torch.rot90(volume, 1, (2 + plane[0], 2 + plane[1]))
    torch.testing.assert_close(ours, turned, atol=1e-4, rtol=0)


def test_a_shift_of_whole_voxels_moves_content_to_higher_indices_and_continues_the_border() -> None:
    volume = torch.randn(1, 1, 8, 10, 4)
    ours = affine_batch(volume, **unchanged() | {"shift_B3": torch.tensor([[2 / 8, -3 / 10, 0.0]])})
    torch.testing.assert_close(ours[:, :, 2:, :7], volume[:, :, :6, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ours[:, :, :2, :7], volume[:, :, :1, 3:].expand(-1, -1, 2, -1, -1), atol=1e-5, rtol=0
    )


def test_a_scale_above_one_magnifies() -> None:
    volume = torch.zeros(1, 1, 20, 20, 20)
    volume[:, :, 8:12, 8:12, 8:12] = 1
    ours = affine_batch(volume, **unchanged() | {"scale_B": torch.tensor([1.5])})
    assert ours.sum().item() == pytest.approx(1.5**3 * volume.sum().item(), rel=0.05)


def test_each_volume_has_its_own_affine_and_channels_move_together() -> None:
    volumes = torch.cat([smooth_volume(seed=0), smooth_volume(seed=1)])
    volumes = torch.cat([volumes, 2 * volumes], dim=1)
    angles = torch.tensor([[0.2, 0.1, 0.0], [-0.1, 0.0, 0.3]])
    both = affine_batch(volumes, **unchanged(2) | {"angles_B3": angles})
    for b in range(2):
        alone = affine_batch(volumes[b : b + 1], **unchanged() | {"angles_B3": angles[b : b + 1]})
        torch.testing.assert_close(both[b : b + 1], alone)
    torch.testing.assert_close(both[:, 1], 2 * both[:, 0])


def test_coordinates_are_float32_under_autocast_and_for_half_precision_volumes() -> None:
    volumes = torch.randn(2, 1, 16, 20, 12).half()
    plain = augment_batch(volumes, strength=1.0, flip_axes="x", generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = augment_batch(volumes, strength=1.0, flip_axes="x", generator=generator(0))
    wide = augment_batch(volumes.float(), strength=1.0, flip_axes="x", generator=generator(0))
    assert ours.dtype == torch.float16
    assert torch.equal(ours, plain)
    assert torch.equal(ours, wide.half())


# Flips


def test_flips_are_exact_and_each_letter_is_its_axis() -> None:
    volumes = torch.randn(2, 1, 3, 4, 5)
    flipped = torch.tensor([[True, True, True], [False, False, False]])
    for letters, axes in (
        ("x", [1]),
        ("y", [2]),
        ("z", [3]),
        ("xz", [1, 3]),
        ("zyx", [1, 2, 3]),
        ("", []),
    ):
        ours = flip_batch(volumes, flipped, letters)
        assert torch.equal(ours[0], volumes[0].flip(axes))
        assert torch.equal(ours[1], volumes[1])


def test_at_strength_zero_only_flips_are_left_and_they_take_half_of_the_volumes() -> None:
    volumes = torch.randn(400, 1, 2, 3, 2)
    ours = augment_batch(volumes, strength=0.0, flip_axes="y", generator=generator(3))
    same = (ours == volumes).flatten(1).all(1)
    mirrored = (ours == volumes.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_axes_are_flipped_independently_of_each_other() -> None:
    volumes = torch.arange(8.0).view(1, 1, 2, 2, 2).expand(400, -1, -1, -1, -1)
    ours = augment_batch(volumes, strength=0.0, flip_axes="xyz", generator=generator(3))
    corners, counts = ours[:, 0, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == list(range(8))
    assert counts.min() > 25


def test_flips_do_not_depend_on_the_strength() -> None:
    volumes = torch.zeros(32, 1, 8, 8, 8)
    volumes[:, :, 4:] = 100.0
    only = augment_batch(volumes, strength=0.0, flip_axes="x", generator=generator(1))
    both = augment_batch(volumes, strength=1.0, flip_axes="x", generator=generator(1))
    assert torch.equal(only[:, 0, 7].mean((1, 2)) > 50, both[:, 0, 7].mean((1, 2)) > 50)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="flip_axes='w': letters of x, y, z"):
        augment_batch(
            torch.zeros(1, 1, 2, 2, 2), strength=0.0, flip_axes="w", generator=generator(0)
        )


# All of it


def test_switched_off_it_returns_the_batch_itself_and_draws_nothing() -> None:
    volumes = torch.randn(2, 1, 4, 4, 4)
    source = generator(0)
    before = source.get_state()
    assert augment_batch(volumes, strength=0.0, flip_axes="", generator=source) is volumes
    assert torch.equal(source.get_state(), before)


def test_a_step_is_repeated_from_its_seed_alone_and_steps_differ() -> None:
    volumes = torch.randn(3, 2, 10, 12, 8)
    original = volumes.clone()
    first = augment_batch(volumes, strength=1.0, flip_axes="xyz", generator=generator(7, 3, 11))
    torch.rand(5)  # the global state takes no part
    again = augment_batch(volumes, strength=1.0, flip_axes="xyz", generator=generator(7, 3, 11))
    assert torch.equal(first, again)
    assert torch.equal(volumes, original)
    for other in ((7, 3, 12), (7, 4, 11), (8, 3, 11)):
        assert not torch.allclose(
            first,
            augment_batch(volumes, strength=1.0, flip_axes="xyz", generator=generator(*other)),
        )


def test_volumes_of_a_batch_are_changed_differently() -> None:
    volumes = smooth_volume().expand(4, -1, -1, -1, -1)
    ours = augment_batch(volumes, strength=1.0, flip_axes="", generator=generator(0))
    assert ours.shape == volumes.shape
    assert all(not torch.allclose(ours[a], ours[b], atol=0.01) for a in range(4) for b in range(a))


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_intensity_and_noise_keep_to_their_ranges_and_use_them(strength: float) -> None:
    ones = torch.ones(300, 1, 6, 6, 6)  # resampling changes nothing here
    ours = augment_batch(ones, strength=strength, flip_axes="", generator=generator(0))
    gains, sigmas = ours.mean((1, 2, 3, 4)) - 1, ours.std((1, 2, 3, 4))
    assert gains.abs().max() < 0.2 * strength + 0.02 * strength
    assert gains.max() > 0.12 * strength
    assert gains.min() < -0.12 * strength
    assert sigmas.max() < 0.05 * strength * 1.2
    assert sigmas.max() > 0.045 * strength
    assert sigmas.min() < 0.005 * strength


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_shifts_and_scales_keep_to_their_ranges(strength: float) -> None:
    # Three ramps as channels: after the affine, their values around the center are where the center was read
    side = 21
    axis = torch.arange(side, dtype=torch.float32) - side // 2
    ramps = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    ours = augment_batch(
        ramps.expand(100, -1, -1, -1, -1), strength=strength, flip_axes="", generator=generator(0)
    )
    middle = side // 2
    jacobian = torch.stack(
        [
            ours[:, :, middle + 5 * (i == 0), middle + 5 * (i == 1), middle + 5 * (i == 2)]
            - ours[:, :, middle - 5 * (i == 0), middle - 5 * (i == 1), middle - 5 * (i == 2)]
            for i in range(3)
        ],
        dim=2,
    )
    # read with R^T / scale, times the intensity's gain within a tenth: an orthogonal matrix times a number
    squares = jacobian @ jacobian.transpose(1, 2) / 100
    factors = squares.diagonal(dim1=1, dim2=2).mean(1).sqrt()
    assert factors.max() < (1 + 0.1 * strength) / (1 - 0.1 * strength) + 0.06
    assert factors.min() > (1 - 0.1 * strength) / (1 + 0.1 * strength) - 0.06
    off_diagonal = squares - torch.diag_embed(squares.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.1
    turned = torch.arccos(
        ((jacobian / 10 / factors[:, None, None]).diagonal(dim1=1, dim2=2).sum(1) - 1)
        .div(2)
        .clamp(-1, 1)
    )
    assert turned.max() < math.radians(15 * strength) * math.sqrt(3) * 1.15
    assert turned.max() > math.radians(15 * strength)
    read_at = ours[:, :, middle, middle, middle].abs().max()
    bound = (
        0.05 * strength * side * math.sqrt(3) * (1 + 0.1 * strength) / (1 - 0.1 * strength)
        + 0.3 * strength
        + 0.1
    )
    assert 0.04 * strength * side < read_at < bound


def test_it_reads_nothing_back_to_the_host() -> None:
    with FakeTensorMode():  # tensors without values: whatever looks at one raises
        volumes = torch.zeros(4, 1, 8, 9, 10)
        ours = augment_batch(volumes, strength=1.0, flip_axes="xyz", generator=torch.Generator())
        assert ours.shape == volumes.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: captures a CUDA graph")
def test_captured_augmentation_equals_the_eager_one_for_each_seed() -> None:
    volumes = torch.randn(6, 1, 32, 40, 24, device="cuda").half()
    source = torch.Generator("cuda")
    options: dict[str, Any] = {"strength": 1.0, "flip_axes": "xyz", "generator": source}
    augment_batch(volumes, **options)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(source)
    with torch.cuda.graph(graph):
        captured = augment_batch(volumes, **options)
    for seed in (1, 2, 3):
        source.manual_seed(seed)
        graph.replay()
        ours = captured.clone()
        source.manual_seed(seed)
        assert torch.equal(ours, augment_batch(volumes, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: compares devices")
def test_the_affine_is_the_same_on_the_gpu_under_autocast_and_tf32() -> None:
    volume = smooth_volume((48, 64, 32))
    options: dict[str, Any] = {
        "angles_B3": torch.tensor([[0.2, -0.3, 0.25]]),
        "scale_B": torch.tensor([0.9]),
    }
    options["shift_B3"] = torch.tensor([[-0.05, 0.03, 0.01]])
    expected = affine_batch(volume, **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            ours = affine_batch(
                volume.cuda(), **{name: value.cuda() for name, value in options.items()}
            )
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-5, rtol=0)
