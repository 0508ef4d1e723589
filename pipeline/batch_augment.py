"""What happens to a batch on the device: colour and geometry policies, erasing, mixup, cutmix.

Every decision is made on the host, from numbers that belong to the samples; the device gets index tensors and
strengths, and is never waited for. Until they are normalised pictures stay 8-bit levels, rounded after each
operation as Pillow rounds: colours equal Pillow's bit for bit, geometry but for one level in 1 of 130 values.
(kornia 0.9 is off by 0.4 levels in the mean, and slower where it loops over the samples.)
"""

import math
from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.config import AugmentConfig
from pipeline.data import to_device

# B batch  n the samples of one operation  H, W height and width in pixels
# "pixels" are (n, H, W, 3) uint8 and "images" (B, 3, H, W) float32, normalised.

BINS = 31  # strengths that an operation of a policy can have
MAX_OPS = 8  # of RandAugment, for each picture
ERASE_TRIES = 3  # a drawn rectangle may be too long for the picture
ERASE_AREA, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # share of the picture; height / width

# What the columns of `draws` decide.
_JITTER = slice(0, 4)  # order; strength of brightness, contrast, saturation
_POLICY = slice(_JITTER.stop, _JITTER.stop + 3 * MAX_OPS)  # of each round: operation, strength, sign
_ERASE = slice(_POLICY.stop, _POLICY.stop + 3 + 2 * ERASE_TRIES)  # whether, row, column; tries: area, ratio
_MIX = slice(_ERASE.stop, _ERASE.stop + 5)  # which; two for lambda; centre of the box: row, column
DRAWS = _MIX.stop  # uniform numbers that a sample needs at most, whatever the settings


class Round(NamedTuple):
    """One operation for each sample, on the host: its place in OPERATIONS, its strength with sign (float32)."""

    operations: Tensor  # (B,)
    strengths: Tensor  # (B,)


@torch.no_grad()
def augment_batch(
    images: Tensor, labels: Tensor, draws: Tensor, config: AugmentConfig, *, classes: int
) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, augmented, normalised, channels last in memory; and targets.

    images, labels: on the device; labels (B,) int64 come back as they are, or, where mixup or cutmix is on, as
    (B, classes) float32 shares. draws: (B, DRAWS) uniform in [0, 1), on the host (not looked at if nothing is
    on); row i decides what becomes of sample i, whatever batch it is in. Only mixing concerns the batch: it
    takes the numbers of its first sample, and mixes sample i with sample B-1-i.

    The order is torchvision's: colour jitter, policy, normalisation, erasing, mixing.
    """
    if config == AugmentConfig():
        return to_device(images, images.device), labels
    assert draws.shape == (len(images), DRAWS), f"expected draws ({len(images)}, {DRAWS}), got {draws.shape}"
    assert draws.device.type == "cpu", (
        f"expected draws on the host, got {draws.device}: reading them would wait"
    )
    draws = draws.double()  # in float32 `draw * count` might round up to count
    with torch.autocast(images.device.type, enabled=False):
        rounds = _rounds(draws, config, height=images.shape[1], width=images.shape[2])
        pixels = images.clone() if rounds else images
        for one in rounds:
            _apply(pixels, one)
        normal = to_device(pixels, images.device)
        if config.erase:
            _erase(normal, draws[:, _ERASE], probability=config.erase)
        if config.mixup or config.cutmix:
            return _mix(normal, labels, draws[0, _MIX].tolist(), config, classes=classes)
    return normal, labels


# --- which operations: decided on the host -----------------------------------------------------------------


def _rounds(draws: Tensor, config: AugmentConfig, *, height: int, width: int) -> list[Round]:
    """The operations on 8-bit levels, in their order: of a round each sample has one."""
    rounds = _jitter(draws[:, _JITTER], config.color_jitter) if config.color_jitter else []
    which, how, sign = draws[:, _POLICY].reshape(-1, MAX_OPS, 3).unbind(2)  # (B, MAX_OPS) each
    if config.policy == "randaugment":
        assert config.ops <= MAX_OPS, "there are draws for no more"
        table = _randaugment_strengths(height, width)[:, config.magnitude]
        rounds += [_policy(which[:, i], table.expand(len(draws), -1), sign[:, i]) for i in range(config.ops)]
    elif config.policy == "trivialaugment":
        table = _trivialaugment_strengths().t()[_pick(how[:, 0], BINS)]
        rounds += [_policy(which[:, 0], table, sign[:, 0])]
    return rounds


def _jitter(numbers: Tensor, most: float) -> list[Round]:
    """Brightness, contrast, saturation times 1 - most .. 1 + most, in any order: torchvision's ColorJitter."""
    names = ("brightness", "contrast", "color")
    orders = torch.tensor(list(permutations(range(len(names)))))  # (6, 3)
    order = orders[_pick(numbers[:, 0], len(orders))]  # (B, 3)
    strengths = ((2 * numbers[:, 1:] - 1) * most).gather(1, order)
    operations = torch.tensor([NAMES.index(name) for name in names])[order]
    return [Round(operations[:, i], strengths[:, i].float()) for i in range(len(names))]


def _policy(which: Tensor, table: Tensor, sign: Tensor) -> Round:
    """An operation for each sample, all equally often, with either sign where it has one.

    which, sign: (B,) uniform numbers; table: (B, operations), how strong each would be.
    """
    operations = _pick(which, len(NAMES))
    strengths = table.gather(1, operations.unsqueeze(1)).squeeze(1)
    signed = torch.tensor([name in SIGNED for name in NAMES])[operations]
    return Round(operations, torch.where(signed & (sign < 0.5), -strengths, strengths).float())


def _randaugment_strengths(height: int, width: int) -> Tensor:
    """(operations, BINS) of RandAugment (arXiv 1909.13719) in torchvision's version, which has Identity."""
    far = 150 / 331  # of a side: AutoAugment's 150 pixels of 331
    return _strengths(shear=0.3, across=far * width, down=far * height, rotate=30, blend=0.9, bits=4)


def _trivialaugment_strengths() -> Tensor:
    """(operations, BINS) of TrivialAugment Wide (arXiv 2103.10158), as in torchvision."""
    return _strengths(shear=0.99, across=32, down=32, rotate=135, blend=0.99, bits=6)


def _strengths(*, shear: float, across: float, down: float, rotate: float, blend: float, bits: int) -> Tensor:
    """(operations, BINS): from nothing to the greatest strengths given, whose units OPERATIONS state."""

    def up_to(most: float) -> Tensor:
        # In float64, or 16 pixels, cut to whole ones, become 15: as in torchvision, by its float32.
        return torch.arange(BINS, dtype=torch.float64) * most / (BINS - 1)

    rows = {name: up_to(blend) for name in ("brightness", "color", "contrast", "sharpness")} | {
        "shear_x": up_to(shear),
        "shear_y": up_to(shear),
        "translate_x": up_to(across).trunc(),
        "translate_y": up_to(down).trunc(),
        "rotate": up_to(rotate),
        "posterize": 8 - up_to(bits).round(),
        "solarize": 255 - up_to(255),
    }
    return torch.stack([rows.get(name, up_to(0)) for name in NAMES])


def _pick(numbers: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) -> 0 .. count - 1, each equally often."""
    return (numbers * count).long()


# --- the operations, on the device -------------------------------------------------------------------------


def _apply(pixels: Tensor, one: Round) -> None:
    """Change (B, H, W, 3) pixels in place: the samples of an operation together."""
    counts = torch.bincount(one.operations, minlength=len(NAMES)).tolist()
    order = one.operations.argsort(stable=True)
    samples = torch.split(_send(order, pixels.device), counts)
    strengths = torch.split(_send(one.strengths[order], pixels.device), counts)
    for operation, index, strength in zip(OPERATIONS.values(), samples, strengths, strict=True):
        if operation and len(index):
            pixels.index_copy_(0, index, operation(pixels.index_select(0, index), strength))


def _send(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for: of pageable memory it would be waited for."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _blend(other: Tensor, pixels: Tensor, strength: Tensor) -> Tensor:
    """`other` at strength -1, the picture at 0, beyond it above; cut to whole levels, as Pillow does."""
    factor = (1 + strength).view(-1, 1, 1, 1)
    return (pixels - other).mul_(factor).add_(other).clamp_(0, 255).to(torch.uint8)


def _brightness(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros((), device=pixels.device), pixels, strength)


def _color(pixels: Tensor, strength: Tensor) -> Tensor:
    return _blend(_gray(pixels), pixels, strength)


def _contrast(pixels: Tensor, strength: Tensor) -> Tensor:
    mean = _gray(pixels).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor().float(), pixels, strength)


def _sharpness(pixels: Tensor, strength: Tensor) -> Tensor:
    """Against Pillow's SMOOTH: the mean of 3x3 pixels, the middle five times, but for the picture's rim."""
    levels = pixels.float()
    rows = (levels[:, :-2] + levels[:, 1:-1]).add_(levels[:, 2:])
    total = (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).add_(levels[:, 1:-1, 1:-1], alpha=4)
    smooth = levels.clone()
    smooth[:, 1:-1, 1:-1] = total.div_(13).round_()
    return _blend(smooth, levels, strength)


def _gray(pixels: Tensor) -> Tensor:
    """(n, H, W, 1) float32 of whole levels: ITU-R 601 luma in Pillow's integers, all exact in float32."""
    red, green, blue = (pixels[..., i : i + 1].float() for i in range(3))
    luma = red.mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(32768).div_(65536).floor_()


def _posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits of each level."""
    lost = torch.full_like(bits, 8.0).sub(bits).int()
    return pixels & (torch.full_like(lost, 255) << lost).to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(pixels: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels from the threshold on."""
    return torch.where(pixels < threshold.view(-1, 1, 1, 1), pixels, 255 - pixels)


def _autocontrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255."""
    low, high = (level.double().unsqueeze(-1) for level in (pixels.amin((1, 2)), pixels.amax((1, 2))))
    levels = torch.arange(256, device=pixels.device, dtype=torch.float64)
    span = (high - low).clamp(min=1)
    scale = torch.full_like(span, 255) / span  # 255 / span would round the reciprocal first
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(torch.where(high > low, stretched, levels).to(torch.uint8), pixels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    """Make each channel's levels equally frequent, as far as whole levels go."""
    counts = _histograms(pixels)  # (n, 3, 256)
    levels = torch.arange(256, device=pixels.device)
    brightest = counts.gather(2, pixels.amax((1, 2)).long().unsqueeze(-1))
    step = (counts.sum(2, keepdim=True) - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return _look_up(torch.where(step > 0, table, levels).to(torch.uint8), pixels)


def _histograms(pixels: Tensor) -> Tensor:
    """(n, 3, 256) int64: how often each channel has each level."""
    flat = (pixels + _table_starts(pixels)).flatten()
    ones = torch.ones(1, device=pixels.device, dtype=torch.int32).expand(len(flat))
    counts = torch.zeros(len(pixels) * 3 * 256, device=pixels.device, dtype=torch.int32)
    return counts.index_add_(0, flat, ones).view(-1, 3, 256).long()


def _look_up(tables: Tensor, pixels: Tensor) -> Tensor:
    """Each level replaced by its channel's table, (n, 3, 256)."""
    return tables.flatten().index_select(0, (pixels + _table_starts(pixels)).flatten()).view_as(pixels)


def _table_starts(pixels: Tensor) -> Tensor:
    """(n, 1, 1, 3) int32: where the table of a sample's channel starts; int64 would take twice the time."""
    count = len(pixels) * 3
    return torch.arange(0, count * 256, 256, device=pixels.device, dtype=torch.int32).view(-1, 1, 1, 3)


def _shear_x(pixels: Tensor, slope: Tensor) -> Tensor:
    one, zero = torch.ones_like(slope), torch.zeros_like(slope)
    return _warp(pixels, (one, slope, zero), (zero, one, zero))


def _shear_y(pixels: Tensor, slope: Tensor) -> Tensor:
    one, zero = torch.ones_like(slope), torch.zeros_like(slope)
    return _warp(pixels, (one, zero, zero), (slope, one, zero))


def _translate_x(pixels: Tensor, distance: Tensor) -> Tensor:
    one, zero = torch.ones_like(distance), torch.zeros_like(distance)
    return _warp(pixels, (one, zero, -distance), (zero, one, zero))


def _translate_y(pixels: Tensor, distance: Tensor) -> Tensor:
    one, zero = torch.ones_like(distance), torch.zeros_like(distance)
    return _warp(pixels, (one, zero, zero), (zero, one, -distance))


def _rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """About the centre, counter-clockwise."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    y, x = pixels.shape[1] / 2, pixels.shape[2] / 2
    return _warp(pixels, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


Row = tuple[Tensor, Tensor, Tensor]


def _warp(pixels: Tensor, across: Row, down: Row) -> Tensor:
    """Pixel (x, y) becomes what is at x' = a x + b y + c, y' = d x + e y + f: bilinear, black outside.

    across, down: (a, b, c) and (d, e, f), (n,) each, in pixels from the upper left corner, as in Pillow's
    Image.transform. Not by affine_grid: it multiplies matrices, where TF32 costs a tenth of a pixel.
    """
    height, width = pixels.shape[1:3]
    x = torch.arange(width, device=pixels.device) + 0.5  # (W,)
    y = torch.arange(height, device=pixels.device).unsqueeze(1) + 0.5  # (H, 1)
    (a, b, c), (d, e, f) = ([t.view(-1, 1, 1) for t in row] for row in (across, down))
    u, v = a * x + (b * y + c), d * x + (e * y + f)  # (n, H, W)
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], dim=-1)
    levels = pixels.permute(0, 3, 1, 2).float()
    # Outside is masked, not padded: next to the rim Pillow repeats it and does not mix it with black.
    moved = grid_sample(levels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow cuts to whole levels; what float32 left just below one (by 0.005 at most) is that level.
    return moved.add_(1 / 128).mul_(inside.unsqueeze(1)).to(torch.uint8).permute(0, 2, 3, 1)


Operation = Callable[[Tensor, Tensor], Tensor]  # pixels (n, H, W, 3), strengths (n,) -> pixels
OPERATIONS: dict[str, Operation | None] = {
    "identity": None,
    "shear_x": _shear_x,  # pixels a pixel, about the upper left corner
    "shear_y": _shear_y,
    "translate_x": _translate_x,  # whole pixels
    "translate_y": _translate_y,
    "rotate": _rotate,  # degrees
    "brightness": _brightness,  # strength 0 changes nothing, -1 takes all brightness, colour ... away
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,  # bits that are left
    "solarize": _solarize,  # level
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
NAMES = tuple(OPERATIONS)
SIGNED = NAMES[1:10]  # these go either way


# --- erasing and mixing, of normalised images --------------------------------------------------------------


def _erase(images: Tensor, numbers: Tensor, *, probability: float) -> None:
    """Set a rectangle of some images to zero, the mean colour, in place (Zhong et al., arXiv 1708.04896)."""
    boxes = _erase_boxes(numbers, probability=probability, height=images.shape[2], width=images.shape[3])
    top, bottom, left, right = _send(boxes, images.device).unsqueeze(-1)  # (B, 1) each
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)  # (B, H), (B, W)
    images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)


def _erase_boxes(numbers: Tensor, *, probability: float, height: int, width: int) -> Tensor:
    """(4, B) int64, on the host: top, bottom, left, right; nothing where not to erase, or no try fits."""
    tries = numbers[:, 3:].reshape(-1, ERASE_TRIES, 2)
    area = height * width * _between(tries[..., 0], *ERASE_AREA)
    ratio = _between(tries[..., 1], *map(math.log, ERASE_RATIO)).exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (B, ERASE_TRIES)
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(1, keepdim=True)
    chosen = (numbers[:, 0] < probability) & fits.any(1)
    tall, wide = (side.gather(1, first).squeeze(1) * chosen for side in (tall, wide))
    top = (numbers[:, 1] * (height - tall + 1)).floor()
    left = (numbers[:, 2] * (width - wide + 1)).floor()
    return torch.stack([top, top + tall, left, left + wide]).long()


def _between(numbers: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * numbers


def _mix(
    images: Tensor, labels: Tensor, numbers: list[float], config: AugmentConfig, *, classes: int
) -> tuple[Tensor, Tensor]:
    """Each image with the one at its place from the end: mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899)."""
    which, u, v, row, column = numbers
    if not config.cutmix or (config.mixup and which < 0.5):
        share = _beta(config.mixup, u, v)
        images = images * share + images.flip(0) * (1 - share)
    else:
        height, width = images.shape[2:]
        top, bottom, left, right = _cut_box(_beta(config.cutmix, u, v), row, column, height, width)
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the rim cut off counts
    whole = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).float()
    return images, whole * share + whole.flip(0) * (1 - share)


def _cut_box(share: float, row: float, column: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box of 1 - share of the picture, centred anywhere, cut at the rim."""
    side = math.sqrt(1 - share) / 2
    y, x = int(row * height), int(column * width)
    tall, wide = int(side * height), int(side * width)
    return max(0, y - tall), min(height, y + tall), max(0, x - wide), min(width, x + wide)


def _beta(alpha: float, u: float, v: float) -> float:
    """Beta(alpha, alpha) of two uniform numbers in [0, 1): exact, in closed form.

    sqrt(q) below is a Student t of 2 alpha degrees of freedom over sqrt(2 alpha) by its polar method (Bailey,
    Math. Comp. 62, 1994), and 1/2 + t / 2 sqrt(2 alpha + t^2) is a symmetric beta (Devroye, WSC 1996).
    """
    cos = math.cos(2 * math.pi * v)
    q = math.expm1(min(-math.log1p(-u) / alpha, 700.0)) * cos * cos  # 700: e^710 is beyond a double
    return 0.5 + math.copysign(0.5, cos) * math.sqrt(q / (1 + q))
