"""Pictures composed from descriptions: what is said is where, as large and on what it is said to be; and the judge sees it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffuserve_training.backgrounds import BACKGROUNDS
from diffuserve_training.cases import NEW_COLOUR, NEW_PAIR, SHARES, cases_of
from diffuserve_training.compose import Layout, compose
from diffuserve_training.dataset import Icons, Pictures
from diffuserve_training.description import PLACES, RELATIONS, Background, Description, HeldOut, Thing
from diffuserve_training.evaluate import Share, composed, judged
from diffuserve_training.layout import Laid, Picture
from tests.training.drawings import small_training, some_icons

GREEN = Background("plain", ("green",))
RED, BLUE = (0xD0, 0x40, 0x40), (0x40, 0x60, 0xD0)  # of the icons: the first four are red, the others blue
CIRCLE, SQUARE, TRIANGLE = 0, 1, 2
FLAT_SQUARE = 5


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    return some_icons(tmp_path_factory.mktemp("icons"))


def drawn(icons: Icons, description: Description, size: tuple[int, int] = (64, 64), seed: int = 0) -> NDArray[Any]:
    """(H, W, 3) of 0 .. 255."""
    choose = random.Random(seed)  # noqa: S311 - a picture, no secret
    layout = Pictures(icons, small_training().data).layout([description], size, choose)
    return ((compose(icons.atlas, layout)[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()


def box(image: NDArray[Any], colour: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height of what has a colour, as shares of the picture."""
    rows, columns = np.nonzero(np.abs(image - colour).max(axis=2) < 40)
    height, width = image.shape[:2]
    sides = np.ptp(columns) + 1, np.ptp(rows) + 1
    return columns.min() / width, rows.min() / height, sides[0] / width, sides[1] / height


def test_a_thing_is_drawn_where_it_is_laid_and_as_it_is_turned(icons: Icons) -> None:
    ground = ((0.0, 255.0, 0.0), (0.0, 255.0, 0.0))

    def picture(turn: float, mirrored: bool = False) -> NDArray[Any]:
        laid = Laid(TRIANGLE, 20.0, 40.0, 30.0, np.deg2rad(turn), mirrored)
        layout = Layout.of([Picture((laid,), ground, (1.0, 0.0, 0.0, 1.0), 0.0)], (64, 64))
        return ((compose(icons.atlas, layout)[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()

    upright = picture(0)
    assert upright[2, 2].tolist() == [0, 255, 0]
    assert upright[40, 20] == pytest.approx(RED, abs=2)
    assert box(upright, RED) == pytest.approx((5 / 64, 26 / 64, 30 / 64, 28 / 64), abs=0.06)
    rows = (np.abs(upright - RED).max(axis=2) < 40).sum(axis=1)
    assert rows[30] < rows[50]  # the tip is above
    turned = (np.abs(picture(90) - RED).max(axis=2) < 40).sum(axis=0)
    assert turned[30] < turned[10]  # clockwise: the tip is on the right
    assert np.abs(picture(0, mirrored=True) - upright).max() < 30  # the same on both sides
    assert np.abs(picture(20, mirrored=True) - picture(20)).mean() < 2
    assert np.abs(picture(20) - picture(-20)).mean() > 5


def test_shades_are_those_of_the_larger_drawing_at_any_size(icons: Icons) -> None:
    """Whichever of the three drawings is used, as much of the picture is covered as the thing's size says."""
    ground = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    for size_px in (130.0, 90.0, 60.0, 40.0, 25.0):
        laid = Laid(SQUARE, 80.0, 80.0, size_px, 0.0, False)
        layout = Layout.of([Picture((laid,), ground, (1.0, 0.0, 0.0, 1.0), 0.0)], (160, 160))
        image = (compose(icons.atlas, layout)[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert image[..., 0].sum() / RED[0] == pytest.approx(size_px**2, rel=0.04)


@pytest.mark.parametrize("place", PLACES)
def test_a_thing_is_in_its_place(icons: Icons, place: str) -> None:
    for seed, size in enumerate([(64, 64), (96, 64), (64, 96)] * 2):
        image = drawn(icons, Description((Thing(CIRCLE),), None, place, GREEN), size, seed)
        left, top, width, height = box(image, RED)
        for where, low, side in zip(PLACES[place], (left, top), (width, height), strict=True):
            share = low / max(1e-6, 1 - side)
            assert (share < 0.35) if where < 0 else (share > 0.65) if where > 0 else (0.2 < share < 0.8)


def test_sizes_do_not_overlap_and_chance_fills_what_is_not_said(icons: Icons) -> None:
    def sides(size: str | None) -> list[float]:
        description = Description((Thing(CIRCLE, size),), background=GREEN)
        return [box(drawn(icons, description, seed=seed), RED)[2] for seed in range(30)]

    small, large, anything = sides("small"), sides("large"), sides(None)
    assert max(small) < 0.48 < 0.68 < min(large)
    assert min(anything) < 0.45
    assert max(anything) > 0.75


@pytest.mark.parametrize("relation", [None, *RELATIONS])
def test_two_things_lie_as_they_are_said_to_and_apart(icons: Icons, relation: str | None) -> None:
    for seed in range(6):
        description = Description((Thing(CIRCLE), Thing(FLAT_SQUARE)), relation, None, GREEN)
        image = drawn(icons, description, ((64, 64), (96, 48))[seed % 2], seed)
        one, other = box(image, RED), box(image, BLUE)
        gap = [
            max(one[axis], other[axis]) - min(one[axis] + one[axis + 2], other[axis] + other[axis + 2])
            for axis in (0, 1)
        ]
        assert max(gap) > -0.08  # turned, corners may come a little closer
        if relation in ("left of", "above"):
            assert one[relation == "above"] < other[relation == "above"]
        if relation in ("right of", "below"):
            assert one[relation == "below"] > other[relation == "below"]


def test_backgrounds_begin_and_end_as_they_are_said_to(icons: Icons) -> None:
    for seed in range(8):
        for kind in ("two", "gradient"):
            description = Description((Thing(CIRCLE, "small"),), None, "center", Background(kind, ("teal", "pink")))
            image = drawn(icons, description, seed=seed)
            assert image[0, 0] == pytest.approx(BACKGROUNDS["teal"], abs=45)
            assert image[-1, -1] == pytest.approx(BACKGROUNDS["pink"], abs=45)
            colours = len(np.unique(image[0], axis=0)) + len(np.unique(image[:, 0], axis=0))
            assert (colours > 30) == (kind == "gradient")
        soft = drawn(
            icons, Description((Thing(CIRCLE, "small"),), None, "center", Background("soft", ("teal",))), seed=seed
        )
        assert soft[0, 0].sum() > soft[-1, -1].sum() + 60


def test_a_shadow_is_there_when_it_is_asked_for_alone(icons: Icons) -> None:
    description = Description((Thing(CIRCLE, "small"),), None, "center", Background("plain", ("white",)))
    plain = drawn(icons, description)
    shaded = drawn(icons, Description(description.things, None, "center", description.background, shadow=True))
    gray = (np.ptp(shaded, axis=2) < 3) & (shaded.mean(axis=2) < 240)
    assert gray.sum() > 40
    assert (plain[gray] > 240).all()


def test_a_crop_shows_the_same_pixels(icons: Icons) -> None:
    pictures = Pictures(icons, small_training().data)
    layout, _ = pictures.native(6, random.Random(1))  # noqa: S311 - pictures, no secret
    whole = compose(icons.atlas, layout)
    crops = compose(icons.atlas, layout.cropped(32, random.Random(2)))  # noqa: S311
    assert crops.shape == (6, 3, 32, 32)
    for image, crop in zip(whole, crops, strict=True):
        errors = [
            float((image[:, top : top + 32, left : left + 32] - crop).abs().mean())
            for top in range(33)
            for left in range(33)
        ]
        assert min(errors) < 0.01  # a shadow at an edge has less to be blurred with


def test_pictures_of_two_things_come_first(icons: Icons) -> None:
    thing = Laid(0, 1.0, 1.0, 4.0, 0.0, False)
    one, two = (Picture((thing,) * count, ((0.0,) * 3,) * 2, (1.0, 0.0, 0.0, 1.0), 0.0) for count in (1, 2))  # type: ignore[arg-type]
    assert Layout.of([two, one], (8, 8)).icon.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="two things come first"):
        Layout.of([one, two], (8, 8))


def test_the_judge_sees_what_training_pictures_show_and_what_they_do_not(icons: Icons) -> None:
    data = small_training().data
    cases = cases_of(icons.icons, ("glossy", "flat"), 0.3, 25)
    images = composed(cases, icons, data)
    named, aspects = judged(images, cases, icons)
    assert sum(named[group].right for group in SHARES) >= 22
    for name in ("style", "background", "place", "size"):
        assert aspects[name].share >= 0.85, name
    others, wrong = judged(images[::-1].copy(), cases, icons)
    assert sum(others[group].right for group in SHARES) < 10
    assert wrong["background"].share < 0.5


def test_cases_are_held_out_where_they_say_so(icons: Icons) -> None:
    held_out = HeldOut(0.3)
    cases = cases_of(icons.icons, ("flat",), 0.3, 100)
    assert [case.prompt for case in cases] == [case.prompt for case in cases_of(icons.icons, ("flat",), 0.3, 100)]
    for group, share in SHARES.items():
        assert sum(case.group == group for case in cases) == pytest.approx(100 * share, abs=1)
    for case in cases:
        names = [icons.icons[thing.icon].name for thing in case.description.things]
        assert case.description.background is not None
        colours = case.description.background.colours
        assert any(held_out(name, colour) for name in names for colour in colours) == (case.group == NEW_COLOUR)
        assert (len(names) == 2 and held_out(*names)) == (case.group == NEW_PAIR)


def test_an_interval_is_wilsons() -> None:
    """From Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert Share(263, 81).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Share(20, 0).interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert torch.isnan(torch.tensor(Share(0, 0).share))
