"""The built-in street scenes: a small generator of labelled images in the real datasets' layouts.

The real datasets need a registration and 100 GB. This file draws street scenes with numpy and
Pillow, so that a newcomer or a test can train at once. It writes them in the folder trees that the
readers of common.py expect: GTA5 (palette labels), Cityscapes (labelIds, train and val) and, on
request, SYNTHIA (16-bit labels) and Synscapes.

    python demo/scenes.py data/scenes                          what the demos draw by themselves
    python demo/scenes.py data/synthia --synthia               with a SYNTHIA tree beside it
    python demo/scenes.py data/native --source-size 1914x1052 --target-size 2048x1024 \\
        --num-source 60 --num-target 60 --num-val 20           native sizes, to time a run

Source and target show the same kind of streets. They differ in hue (PAINT) and texture, blur and
noise (GAP). A share of the target is hard (HARD): fog, night or rain. This is the gap inside the
target that IntraDA closes. All lengths are relative. Sizes are (W, H), labels are trainIds.

Contents   1 constants   2 shapes   3 sprites   4 brush   5 street and objects   6 weather
           7 one scene   8 trees of files   9 command line
"""

import argparse
import colorsys
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

if __name__ == "__main__":  # as a script, Python looks for common.py in demo/ and not above it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import CITYSCAPES_IDS, COLOURS, IGNORE, SYNTHIA_IDS

# ---------------------------------------------------------------- 1 constants

# fmt: off (tables of numbers and polygons read best as tables)

# Lengths are fractions of the image's width, opacities and amplitudes fractions of 1.

# How much the images of one domain vary. More variety makes the gap between the domains smaller.
VARIETY = dict(
    surface=0.15,  # of a surface's colour from image to image
    light=0.20,    # of the brightness
    tint=0.06,     # of the colour of the light
)

# What makes the target look different from the source, besides the hues of PAINT. (BatchNorm
# cannot undo a change of hue.)
DOMAINS = ("source", "target")
GAP = dict(
    texture=(1.0, 0.7),   # of the source, of the target
    noise=(0.006, 0.02),
    contrast=1.0,         # gain about mid-grey, of the target
    blur=0.0015,          # of the target
)

# What makes a target image hard.
HARD = dict(
    share=0.4,                        # of the target images
    kinds=("fog", "night", "rain"),   # each hard image is of one kind
    fog=0.15,
    rain=0.3, streaks=90, reflection=0.4,
    # Every hard image has all that follows. It is local or directional: BatchNorm cannot undo it.
    # Plurals are counts, the others strengths.
    motion=0.004,
    shadow=0.5, shadows=4,
    glare=0.6, glares=2,
    dirt=0.7, dirts=8,
    drop=0.8, drops=14,
)

# surface: (source RGB, target RGB)
PAINT = dict(
    road=((84, 80, 92), (92, 80, 86)),
    line=((250, 250, 250), (250, 250, 250)),
    sidewalk=((196, 160, 150), (196, 150, 194)),
    tile=((160, 122, 114), (144, 160, 114)),
    terrain=((150, 190, 60), (190, 78, 60)),
    sky=((96, 164, 240), (196, 96, 240)),
    leaf=((52, 132, 40), (132, 105, 40)),
    trunk=((96, 64, 36), (58, 96, 36)),
    brick=((188, 100, 72), (188, 72, 179)),
    mortar=((226, 206, 190), (204, 226, 190)),
    fence=((150, 100, 50), (150, 50, 117)),
    metal=((128, 132, 146), (145, 128, 146)),
    glass=((50, 70, 100), (50, 100, 72)),
    dark=((22, 22, 26), (26, 22, 25)),
    skin=((232, 180, 140), (177, 232, 140)),
    white=((250, 250, 250), (250, 250, 250)),
    red=((230, 20, 20), (195, 20, 230)),
    blue=((20, 60, 220), (213, 20, 220)),
    yellow=((250, 210, 0), (0, 250, 2)),
    green=((20, 220, 90), (183, 220, 20)),
    lamp=((255, 246, 214), (216, 255, 214)),
)

# ---------------------------------------------------------------- 2 shapes: polygons of (x, y)


def rect(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def disc(x, y, rx, ry, hole=0.0):
    """Ellipse as a polygon; hole: the part of the radius that is left out (a tyre)."""
    angle = np.linspace(0, 2 * np.pi, 21)
    rim = np.stack([np.cos(angle) * rx, np.sin(angle) * ry], 1)
    if hole:
        rim = np.concatenate([rim, rim[::-1] * hole])
    return rim + (x, y)


def stroke(x0, y0, x1, y1, width):
    """A straight line of this width."""
    length = np.hypot(x1 - x0, y1 - y0)
    side = np.array([y0 - y1, x1 - x0]) / length * width / 2
    return [(x0, y0) + side, (x1, y1) + side, (x1, y1) - side, (x0, y0) - side]


# ---------------------------------------------------------------- 3 sprites
# A sprite is a list of parts (trainId, colour, polygon) in a unit square, x to the right and y
# down, painted in this order. trainId None leaves the label as it is, colour None leaves the image
# as it is. Each object gets its own random colours "body" and "trim".


def bars(colour, xs, width, y0, y1):
    """Upright bars that start at each x of xs."""
    return [(None, colour, rect(x, y0, x + width, y1)) for x in xs]


def wheels(train_id, xs, y, rx, ry):
    tyres = [(train_id, "dark", disc(x, y, rx, ry)) for x in xs]
    hubs = [(None, "metal", disc(x, y, rx / 2, ry / 2)) for x in xs]
    return tyres + hubs


SHADE = (None, "dark", disc(.5, .99, .5, .05))  # on the ground under a vehicle
CAR = [
    SHADE,
    (13, "body", [(0, .5), (.16, .44), (.3, .02), (.74, .02),
                  (.9, .44), (1, .52), (1, .86), (0, .86)]),
    (None, "glass", [(.23, .44), (.34, .12), (.5, .12), (.5, .44)]),
    (None, "lamp", rect(0, .54, .06, .66)),
    (None, "glass", [(.54, .44), (.54, .12), (.7, .12), (.82, .44)]),
    (None, "red", rect(.95, .54, 1, .66)),
    (None, "dark", rect(0, .76, 1, .86)),
    *wheels(13, (.22, .78), .83, .11, .17),
]
TRUCK = [
    SHADE,
    (14, "dark", rect(.03, .7, .98, .86)),
    (14, "trim", rect(.32, 0, 1, .76)),
    *bars("body", (.49, .66, .83), .012, .06, .7),
    (14, "body", [(0, .45), (.08, .2), (.28, .2), (.28, .84), (0, .84)]),
    (None, "glass", [(.03, .46), (.1, .26), (.2, .26), (.2, .46)]),
    (None, "lamp", rect(0, .62, .04, .72)),
    *wheels(14, (.16, .72, .88), .86, .07, .14),
]
BUS = [
    SHADE,
    (15, "body", rect(0, 0, 1, .88)),
    (None, "trim", rect(0, .56, 1, .66)),
    *bars("glass", (.03, .32, .47, .62, .77), .12, .12, .48),
    (None, "glass", rect(.18, .12, .29, .84)),
    (None, "lamp", rect(0, .7, .03, .78)),
    (None, "white", rect(.02, .02, .16, .09)),
    *wheels(15, (.2, .78), .87, .07, .13),
]
TRAIN = [
    (16, "body", [(0, .62), (.1, .14), (1, .14), (1, .94), (0, .94)]),
    (16, "metal", rect(.12, .08, 1, .15)),
    (None, "glass", [(.03, .54), (.1, .24), (1, .24), (1, .46), (.15, .46), (.13, .54)]),
    *bars("white", (.24, .5, .76), .07, .2, .88),
    *bars("dark", (.27, .53, .79), .012, .2, .88),
    (None, "trim", rect(.01, .66, 1, .72)),
    (16, "dark", rect(.02, .9, 1, 1)),
    (16, "dark", stroke(.55, .08, .65, 0, .02)),
    (None, "lamp", disc(.05, .76, .02, .05)),
]
PERSON = [
    (11, "trim", [(.24, .5), (.76, .5), (.86, 1), (.6, 1), (.5, .66), (.38, 1), (.12, 1)]),
    (11, "body", [(.16, .19), (.84, .19), (1, .54), (.82, .56), (.76, .34),
                  (.76, .56), (.24, .56), (.24, .34), (.18, .56), (0, .54)]),
    (11, "skin", disc(.5, .1, .2, .1)),
    (None, "dark", [(.3, .1), (.34, .01), (.66, .01), (.7, .1), (.5, .05)]),
]
RIDER = [  # sits on a bicycle or motorcycle
    (12, "trim", [(.28, .1), (.5, .1), (.62, .34), (.54, .7), (.44, .68), (.48, .4), (.28, .3)]),
    (12, "body", [(.28, .16), (.26, -.36), (.4, -.5), (.58, -.46),
                  (.76, .02), (.68, .1), (.54, -.1), (.5, .18)]),
    (12, "skin", disc(.5, -.62, .09, .16)),
    (12, "trim", [(.4, -.62), (.42, -.78), (.5, -.82), (.58, -.78), (.6, -.64)]),
]
SPOKES = ((.2, 0), (0, .32), (.14, .22), (.14, -.22))  # half of each, from the hub
BICYCLE_FRAME = ((.24, .62, .38, .2), (.38, .2, .68, .2), (.68, .2, .48, .66),
                 (.48, .66, .24, .62), (.66, .1, .76, .6))
BICYCLE = [
    *[(18, None, disc(x, .62, .24, .38)) for x in (.24, .76)],  # whole wheels, as in Cityscapes
    (18, None, [(.24, .62), (.38, .14), (.7, .14), (.76, .62), (.48, .66)]),
    *[(None, "metal", stroke(x - c, .62 - s, x + c, .62 + s, .014))
      for x in (.24, .76) for c, s in SPOKES],
    *[(None, "dark", disc(x, .62, .24, .38, hole=.8)) for x in (.24, .76)],
    *[(18, "body", stroke(*ends, .045)) for ends in BICYCLE_FRAME],
    (18, "dark", rect(.28, .1, .46, .18)),
    (18, "dark", stroke(.58, .07, .7, .07, .06)),
]
MOTORCYCLE = [
    SHADE,
    *wheels(17, (.22, .78), .66, .22, .34),
    (17, "dark", stroke(.62, .06, .82, .62, .06)),
    (17, "body", [(.1, .3), (.42, .36), (.52, .16), (.7, .2),
                  (.84, .5), (.66, .86), (.34, .88), (.26, .58)]),
    (None, "metal", [(.36, .58), (.62, .54), (.6, .84), (.38, .84)]),
    (17, "dark", rect(.12, .24, .46, .36)),
    (17, "lamp", disc(.8, .22, .05, .08)),
    (17, "metal", stroke(.05, .82, .45, .82, .07)),
]
POST = (5, "metal", rect(.36, .02, .64, 1))
POLE = [
    POST,
    (5, "metal", [(.36, .02), (1.5, 0), (1.5, .03), (.64, .06)]),
    (None, "lamp", rect(1.1, .02, 1.5, .045)),
]
NO_ENTRY = [
    POST,
    (7, "red", disc(.5, .16, 1, .16)),
    (None, "white", rect(-.2, .12, 1.2, .2)),
]
WARNING = [
    POST,
    (7, "red", [(.5, -.04), (1.6, .32), (-.6, .32)]),
    (None, "white", [(.5, .06), (1.1, .28), (-.1, .28)]),
    (None, "dark", rect(.4, .12, .6, .26)),
]
ONE_WAY = [
    POST,
    (7, "blue", rect(-.45, 0, 1.45, .32)),
    (None, "white", [(.5, .03), (1.1, .15), (.68, .15), (.68, .28),
                     (.32, .28), (.32, .15), (-.1, .15)]),
]


def traffic_light(*lamps):
    """Three lamps from top to bottom; "glass" is a lamp that is off."""
    case = [(6, "yellow", rect(-.08, -.005, 1.08, .275))]
    case += [(None, "dark", rect(.06, .005, .94, .265))]
    lights = [(None, lamp, disc(.5, .05 + .085 * i, .24, .034)) for i, lamp in enumerate(lamps)]
    return [POST, *case, *lights]


LIGHTS = [
    traffic_light("red", "glass", "glass"),
    traffic_light("glass", "yellow", "glass"),
    traffic_light("glass", "glass", "green"),
]

# kind: (sprites, range of widths, height / width, range of nearness)
# Widths are fractions of the image's; nearness is 0 at the horizon and 1 at the bottom.
OBJECTS = dict(
    car=([CAR], (.20, .29), .85, (.25, .62)),
    truck=([TRUCK], (.30, .40), 1.0, (.2, .5)),
    bus=([BUS], (.32, .42), .92, (.2, .5)),
    train=([TRAIN], (.38, .48), .7, (.2, .45)),
    bicycle=([BICYCLE, BICYCLE + RIDER, BICYCLE + RIDER], (.16, .20), 1.3, (.45, .85)),
    motorcycle=([MOTORCYCLE, MOTORCYCLE + RIDER, MOTORCYCLE + RIDER], (.16, .20), 1.3, (.45, .85)),
    person=([PERSON], (.058, .075), 4.6, (.4, .85)),
    pole=([POLE], (.050, .056), 12.0, (.3, .7)),
    light=(LIGHTS, (.062, .075), 8.5, (.35, .75)),
    sign=([NO_ENTRY, WARNING, ONE_WAY], (.046, .056), 10.5, (.35, .75)),
)

# fmt: on
# ---------------------------------------------------------------- 4 brush


class Brush:
    """Draws the same polygons into image (RGB), label (trainIds) and remoteness (0 near, 255 far),
    in the colours of a domain."""

    def __init__(self, rng, size, domain):
        self.size = np.array(size)
        self.lamps = []  # places of all lamps, in fractions of the image: at night they glow
        self.image = Image.new("RGB", size)
        self.label = Image.new("L", size)
        self.remoteness = Image.new("L", size)
        self.pens = [ImageDraw.Draw(layer) for layer in (self.image, self.label, self.remoteness)]
        plain = np.array([pair[DOMAINS.index(domain)] for pair in PAINT.values()])  # (surfaces, 3)
        colours = plain * np.exp(VARIETY["surface"] * rng.standard_normal(plain.shape))
        rounded = np.clip(colours, 0, 255).astype(int).tolist()
        self.paint = dict(zip(PAINT, map(tuple, rounded)))

    def draw(self, sprite, corners, remoteness=1.0, **paint):
        """Draw the parts of a sprite; paint: colours of this sprite alone, by name.

        corners: the places of the unit square's corners, clockwise from top left, in fractions of
        the image; remoteness: 0..1.
        """
        top_left, top_right, bottom_right, bottom_left = np.asarray(corners) * self.size
        paint = {**self.paint, **paint}
        for train_id, colour, polygon in sprite:
            u, v = np.asarray(polygon, float).T[..., None]  # (points, 1) each
            top = (1 - u) * top_left + u * top_right
            bottom = (1 - u) * bottom_left + u * bottom_right
            points = (1 - v) * top + v * bottom  # (points, 2) pixels
            depth = None if train_id is None else int(255 * remoteness)
            for pen, fill in zip(self.pens, (paint.get(colour), train_id, depth)):
                if fill is not None:
                    pen.polygon(points.round().ravel().tolist(), fill=fill)
            if colour == "lamp":
                self.lamps.append(points.mean(0) / self.size)


def random_paint(rng, saturation=0.85):
    """A random RGB colour; saturation is the highest that it may have."""
    hue = rng.random()
    saturation = saturation * rng.random()
    value = rng.uniform(0.25, 0.95)
    return tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def noise_field(rng, size, columns, rows):
    """Smooth noise (H,W) of standard deviation near 1: the same cells at every image size."""
    grid = rng.standard_normal((rows, columns)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size, Image.BICUBIC))


# ---------------------------------------------------------------- 5 street and objects
# A scene depends on the order of its random numbers: moving a line that draws one changes them all.


def draw_street(rng, brush):
    """Draw all that does not move, from far to near. Returns the horizon in image heights."""
    horizon = rng.uniform(0.40, 0.48)
    vanish = rng.uniform(0.42, 0.58)  # x of the vanishing point
    everything = rect(0, 0, 1, 1)
    brush.draw([(10, "sky", everything), (9, "terrain", rect(0, horizon, 1, 1))], everything)
    draw_houses(rng, brush, horizon, vanish)
    left_edge = rng.uniform(-0.12, 0.10)  # of the road at the bottom of the image
    right_edge = rng.uniform(0.90, 1.12)
    for side, edge in ((-1, left_edge), (1, right_edge)):
        draw_roadside(rng, brush, horizon, vanish, side, edge)
    road = [(0, "road", everything), *bars("line", (0.04, 0.94), 0.02, 0, 1)]
    for y in (0.03, 0.08, 0.18, 0.4, 0.8):  # dashes between the lanes
        road += bars("line", (0.35, 0.63), 0.024, y, 1.5 * y)
    far_left = (vanish - 0.05, horizon)
    far_right = (vanish + 0.05, horizon)
    brush.draw(road, [far_left, far_right, (right_edge, 1), (left_edge, 1)])
    return horizon


def draw_houses(rng, brush, horizon, vanish):
    """A row of houses and trees, lower towards the vanishing point."""
    for x in np.arange(-0.05, 1, 0.14) + rng.uniform(-0.03, 0.03, 8):
        width = rng.uniform(0.14, 0.22)
        aside = abs(x + 0.07 - vanish)
        top = horizon - rng.uniform(0.10, 0.18) - aside * rng.uniform(0.3, 0.6)
        columns = rng.integers(3, 5)  # of windows
        rows = max(2, int((horizon - top) / 0.1))
        house = [(2, "body", rect(0, 0, 1, 1)), (None, "trim", rect(0, 0, 1, 0.05))]
        windows = (np.arange(columns) + 0.25) / columns
        for j in range(rows):
            house += bars("glass", windows, 0.5 / columns, (j + 0.3) / rows, (j + 0.8) / rows)
        ragged = 1 + 0.12 * rng.standard_normal((21, 1))
        crown = disc(0, 0, 0.6, 0.5) * ragged + (0.5, 0.5)
        tree = [(8, "trunk", rect(0.44, 0.6, 0.56, 1)), (8, "leaf", crown)]
        body = random_paint(rng, 0.6)
        trim = random_paint(rng, 0.6)
        sprite = tree if rng.random() < 0.4 else house
        corners = rect(x, top, x + width, horizon + 0.01)
        brush.draw(sprite, corners, 0.9 - 0.6 * aside, body=body, trim=trim)


def draw_roadside(rng, brush, horizon, vanish, side, edge):
    """Draw the pavement, and beside it a wall and a fence (each with probability 0.8).

    side: -1 left, 1 right of the road; edge: x where the road ends at the bottom of the image.
    """
    inner = vanish + side * 0.05  # the pavement at the horizon
    outer = vanish + side * 0.14
    reach = edge + side * rng.uniform(0.25, 0.7)  # its outer edge at the bottom of the image
    pavement = [(1, "sidewalk", rect(0, 0, 1, 1))]
    for y in np.linspace(0.1, 1, 9) ** 2:  # joints, denser far away
        pavement.append((None, "tile", rect(0, y, 1, 1.03 * y + 0.004)))
    pavement += bars("tile", (0, 0.48), 0.04, 0, 1)
    brush.draw(pavement, [(inner, horizon), (outer, horizon), (reach, 1), (edge, 1)])

    wall = [(3, "brick", rect(0, 0, 1, 1))]
    rows = np.arange(5) / 5
    wall += [(None, "mortar", rect(0, y, 1, y + 0.035)) for y in rows]
    for i, y in enumerate(rows):
        wall += bars("mortar", np.arange(0.06 * (i % 2), 1, 0.125), 0.018, y, y + 0.2)
    fence = [(4, None, rect(0, 0, 1, 1))]  # whole in the label, see-through in the image
    fence += [(None, "fence", rect(0, y, 1, y + 0.08)) for y in (0.15, 0.75)]
    fence += bars("fence", np.arange(0, 1, 0.095), 0.05, 0, 1)

    ends = rng.uniform((0.3, 0.15, 0.02), (0.6, 0.25, 0.1))  # nearness along the pavement's edge
    order = rng.permutation(2)
    for k, near, far in zip(order, ends[:2], ends[1:]):
        t = np.array([near, far])
        x = outer + side * 0.04 + t * (reach - outer)
        feet = np.stack([x, horizon + t * (1 - horizon)], 1)
        tops = feet - np.stack([0 * t, 0.10 + 0.22 * t], 1)
        if rng.random() < 0.8:
            brush.draw((wall, fence)[k], [tops[0], tops[1], feet[1], feet[0]], 1 - near)


def draw_objects(rng, brush, horizon):
    """Draw vehicles, people, poles, lights and signs, from far to near."""
    kinds = ["pole", "light", "sign", rng.choice(["pole", "light", "sign"])]
    kinds += ["car"] * rng.integers(1, 3)
    kinds += ["person"] * rng.integers(1, 3)
    kinds += list(rng.permutation(["truck", "bus", "train"])[: rng.integers(1, 3)])
    kinds += list(rng.permutation(["bicycle", "motorcycle"])[: rng.integers(1, 3)])
    slots = (rng.permutation(len(kinds)) + rng.uniform(0.2, 0.8, len(kinds))) / len(kinds)
    nearness = [rng.uniform(*OBJECTS[kind][3]) for kind in kinds]
    for near, kind, x in sorted(zip(nearness, kinds, slots)):
        sprites, widths, aspect, _ = OBJECTS[kind]
        width = rng.uniform(*widths) * (0.75 + 0.5 * near)
        y = horizon + near * (1 - horizon)  # of its feet
        if kind in ("pole", "light", "sign"):
            x = 0.5 + np.sign(x - 0.5) * (0.16 + 0.64 * abs(x - 0.5))  # beside the road
        elif kind != "person":
            x = 0.15 + 0.7 * x  # large, so away from the image border
        half = rng.choice((-1, 1)) * width / 2  # negative: the object is mirrored
        corners = rect(x - half, y - width * aspect, x + half, y)
        sprite = sprites[rng.integers(len(sprites))]
        body = random_paint(rng)
        trim = random_paint(rng)
        brush.draw(sprite, corners, 1 - near, body=body, trim=trim)


# ---------------------------------------------------------------- 6 weather


def blend(image, colour, opacity):
    return image + opacity * (np.asarray(colour, np.float32) - image)


def mask(size, polygons, blur):
    """Soft mask (H,W,1), 0..1, of polygons; blur: its sigma as a fraction of the width."""
    layer = Image.new("L", size)
    pen = ImageDraw.Draw(layer)
    for polygon in polygons:
        pen.polygon((np.asarray(polygon) * size).round().ravel().tolist(), fill=255)
    soft = layer.filter(ImageFilter.GaussianBlur(blur * size[0]))
    return np.asarray(soft, np.float32)[..., None] / 255


def spots(rng, count, radii, y_range=(0, 1)):
    """Polygons of `count` round spots, anywhere in x, within y_range; radii: least and largest."""
    low = (0, y_range[0], radii[0])
    high = (1, y_range[1], radii[1])
    return [disc(x, y, r, 2 * r) for x, y, r in rng.uniform(low, high, (count, 3))]


def motion_blur(image, dx, dy):
    """Mean over a line of (dx, dy) pixels around each pixel.

    The line is halved in each pass over the image: log2(length) passes instead of length.
    """
    image = np.roll(image, (-round(dy / 2), -round(dx / 2)), (0, 1))
    while max(abs(dx), abs(dy)) >= 1:
        dx = dx / 2
        dy = dy / 2
        image = (image + np.roll(image, (round(dy), round(dx)), (0, 1))) / 2
    return image


def render_hard(image, label, remoteness, lamps, horizon, rng):
    """Add fog, night or rain, and in each case shadow, glare, motion blur, dirt and drops.

    image (H,W,3) float32, 0..255; remoteness (H,W,1), 0..1; lamps [(x, y)] in fractions of the
    image.
    """
    height, width = label.shape
    size = (width, height)
    kind = rng.choice(HARD["kinds"])
    for _ in range(HARD["shadows"]):  # of houses and trees that stand outside the picture
        x, w, slant = rng.uniform((-0.2, 0.06, -0.4), (1, 0.2, 0.4))
        band = [(x, horizon), (x + w, horizon), (x + w + slant, 1.1), (x + slant - 0.1, 1.1)]
        image = image * (1 - HARD["shadow"] * mask(size, [band], 0.004))

    if kind == "fog":
        patches = 1 + 0.15 * noise_field(rng, size, 6, 4)[..., None]
        density = HARD["fog"] * patches * (0.25 + 0.75 * remoteness)
        image = blend(image, (198, 200, 202), np.clip(density, 0, 0.95))
    elif kind == "night":
        ahead = [(0.42, horizon + 0.08), (0.58, horizon + 0.08), (0.95, 1), (0.05, 1)]
        beam = mask(size, [ahead], 0.03)
        image = image * (np.float32((0.9, 0.95, 1.15)) + 0.5 * beam)
        lights = [disc(x, y, 0.022, 0.044) for x, y in lamps]
        lights += spots(rng, 3, (0.01, 0.02), (0, 0.45))
        image = blend(image, (255, 222, 160), 0.8 * mask(size, lights, 0.014))
    else:
        rows = 2 * int(horizon * height) - np.arange(height)
        mirrored = image[np.clip(rows, 0, height - 1)]
        wet = np.isin(label, (0, 1))[..., None]  # road and sidewalk
        image = blend(image, mirrored, HARD["reflection"] * wet)
        streaks = rng.uniform((-0.1, -0.1, 0.06), (1.1, 1, 0.2), (HARD["streaks"], 3))
        slant = rng.uniform(-0.15, 0.15)
        drops = [stroke(x, y, x + slant * n, y + n, 0.005) for x, y, n in streaks]
        image = blend(0.85 * image, (205, 210, 215), HARD["rain"] * mask(size, drops, 0.0006))

    glare = mask(size, spots(rng, HARD["glares"], (0.03, 0.08)), 0.02)
    image = blend(image, (255, 244, 220), HARD["glare"] * glare)
    length = HARD["motion"] * width * rng.uniform(0.5, 1.5)
    angle = rng.uniform(-0.4, 0.4)
    image = motion_blur(image, length * np.cos(angle), length * np.sin(angle))
    dirt = mask(size, spots(rng, HARD["dirts"], (0.02, 0.06)), 0.01)
    image = blend(image, random_paint(rng, 0.3), HARD["dirt"] * dirt)
    # A drop on the lens shows another place of the scene, a little brighter.
    refracted = 8 + 1.1 * np.roll(image, (int(0.12 * height), int(0.05 * width)), (0, 1))
    drops = mask(size, spots(rng, HARD["drops"], (0.012, 0.04)), 0.002)
    return blend(image, refracted, HARD["drop"] * drops)


# ---------------------------------------------------------------- 7 one scene


def texture_of(rng, label, size):
    """Relative change of brightness (H,W,1), by which some classes differ without colour."""
    amplitude = np.zeros((3, 256), np.float32)  # kind of texture, trainId
    amplitude[0, [8, 9, 2]] = 0.28, 0.10, 0.04  # leaves: vegetation, terrain, building
    amplitude[1, [9, 8]] = 0.22, 0.04  # upright blades of grass: terrain, vegetation
    amplitude[2, [10, 0, 1]] = 0.06, 0.05, 0.05  # clouds and stains: sky, road, sidewalk
    fields = [noise_field(rng, size, *cells) for cells in ((96, 48), (128, 16), (12, 8))]
    return sum(row[label] * field for row, field in zip(amplitude, fields))[..., None]


def draw_scene(rng, size, domain, hard=False):
    """One street scene. size: (W, H); domain: "source" or "target"; hard: target only.

    Returns image (H,W,3) uint8 RGB and label (H,W) uint8 of trainIds, IGNORE on the own car's
    bonnet. The same rng state shows the same street at every size and in either domain: only
    sensor noise is drawn per pixel.
    """
    seeds = rng.integers(2**62, size=3)
    scene_rng, weather_rng, sensor_rng = (np.random.default_rng(seed) for seed in seeds)
    brush = Brush(scene_rng, size, domain)
    horizon = draw_street(scene_rng, brush)
    draw_objects(scene_rng, brush, horizon)
    bonnet = disc(0.5, 1.05, 0.62, scene_rng.uniform(0.08, 0.11))
    brush.draw([(IGNORE, "dark", bonnet)], rect(0, 0, 1, 1), 0)
    image = np.array(brush.image, np.float32)
    label = np.array(brush.label)

    texture = GAP["texture"][DOMAINS.index(domain)] * texture_of(scene_rng, label, size)
    light = VARIETY["light"] * scene_rng.standard_normal()
    light = light + VARIETY["tint"] * scene_rng.standard_normal(3)  # (3,): of R, G, B
    image *= (1 + texture) * np.exp(light).astype(np.float32)

    if domain == "target":
        image = 128 + GAP["contrast"] * (image - 128)
        if hard:
            remoteness = np.array(brush.remoteness, np.float32) / 255
            # The remoteness of the ground depends on the row.
            rows = 1 - np.linspace(0, 1, size[1], dtype=np.float32)[:, None]
            ground = np.clip(rows / (1 - horizon), 0, 1)
            remoteness = np.where(np.isin(label, (0, 1, 9)), ground, remoteness)[..., None]
            image = render_hard(image, label, remoteness, brush.lamps, horizon, weather_rng)
        sharp = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        soft = sharp.filter(ImageFilter.GaussianBlur(GAP["blur"] * size[0]))
        image = np.asarray(soft, np.float32)
    noise = GAP["noise"][DOMAINS.index(domain)]
    image = image + 255 * noise * sensor_rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), label


# ---------------------------------------------------------------- 8 trees of files

# Tables from trainId to label id, for 256 values: a value without a class becomes "void".
TO_CITYSCAPES = np.ones(256, np.uint8)  # 1 is ego vehicle
TO_CITYSCAPES[:19] = CITYSCAPES_IDS
TO_SYNTHIA = np.zeros(256, np.uint16)
TO_SYNTHIA[:19] = SYNTHIA_IDS
TO_SYNTHIA[[9, 14, 16]] = 0  # terrain, truck and train do not occur in the real labels

CITIES = dict(train=("aldenburg", "brennau", "castelmar"), val=("dornfeld", "eastmere"))


def write_png16(path, channels):
    """channels (H,W,3) of 16-bit values as an RGB PNG, which Pillow cannot write."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    height, width, _ = channels.shape
    rows = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (1, 0)))  # each row starts with its filter's number, 0 for none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # 16 bits, RGB
    pixels = zlib.compress(rows.tobytes(), 3)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_label(path, label, tree):
    """label (H,W) of trainIds, in the encoding of this tree."""
    if tree == "SYNTHIA":
        class_ids = TO_SYNTHIA[label]
        instances = np.broadcast_to(np.arange(label.shape[1]) // 32, label.shape)  # any number
        write_png16(path, np.stack([class_ids, instances, 0 * instances], 2))
        return
    ids = Image.fromarray(TO_CITYSCAPES[label])
    if tree == "GTA5":  # the pixel stays the label id, as the index of a colour
        colours = np.zeros((256, 3), np.uint8)
        colours[TO_CITYSCAPES[:19]] = COLOURS
        ids.putpalette(colours.tobytes())
    ids.save(path, compress_level=3)


def file_names(tree, index):
    """(image, label): the names in the real dataset, relative to the folder of the trees."""
    if tree in CITIES:
        cities = CITIES[tree]
        city = cities[index % len(cities)]
        stem = f"{tree}/{city}/{city}_{index // len(cities):06d}_000019"
        image = f"Cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
        return image, f"Cityscapes/gtFine/{stem}_gtFine_labelIds.png"
    if tree == "GTA5":
        return f"GTA5/images/{index + 1:05d}.png", f"GTA5/labels/{index + 1:05d}.png"
    if tree == "SYNTHIA":
        return f"SYNTHIA/RGB/{index:07d}.png", f"SYNTHIA/GT/LABELS/{index:07d}.png"
    return f"Synscapes/img/rgb/{index + 1}.png", f"Synscapes/img/class/{index + 1}.png"


def write_tree(root, tree, number, count, size, seed):
    """Draw `count` scenes of a tree below root; list target names in <tree>_easy.txt, _hard.txt."""
    domain = "target" if tree in CITIES else "source"
    shuffled = np.random.default_rng((seed, number)).permutation(count)
    hard = shuffled[: round(HARD["share"] * count)]  # without effect on source scenes
    for index in range(count):
        rng = np.random.default_rng((seed, number, index))
        is_hard = index in hard
        image, label = draw_scene(rng, size, domain, is_hard)
        image_name, label_name = file_names(tree, index)
        for name in (image_name, label_name):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / image_name, compress_level=3)
        write_label(root / label_name, label, tree)
        if tree in CITIES:
            part = "hard" if is_hard else "easy"
            with open(root / f"{tree}_{part}.txt", "a") as file:
                file.write(Path(image_name).stem.removesuffix("_leftImg8bit") + "\n")


def write_scenes(root, seed=0, source_size=(256, 128), target_size=(256, 128), num_source=400,
                 num_target=400, num_val=100, synthia=False, synscapes=False):  # fmt: skip
    """Write GTA5, Cityscapes (train and val) and, on request, SYNTHIA and Synscapes below root.

    Sizes are (W, H). An image depends on (seed, tree, index) alone. train_easy.txt, train_hard.txt,
    val_easy.txt and val_hard.txt list the target images as <city>_<seq>_<frame>. Training never
    reads them. `root` must not exist (UserError). It appears when it is complete. An error or
    Ctrl-C leaves nothing behind.
    """
    root = Path(root)
    if root.exists():
        raise common.UserError(f"{root} exists. Remove it, or name a different folder.")
    trees = [  # the place in this list is part of the seed
        ("GTA5", True, num_source, source_size),
        ("train", True, num_target, target_size),
        ("val", True, num_val, target_size),
        ("SYNTHIA", synthia, num_source, source_size),
        ("Synscapes", synscapes, num_source, source_size),
    ]
    root.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder, so that two runs that start at the same time do not collide.
    prefix = f"{root.name}."
    with tempfile.TemporaryDirectory(".partial", prefix, root.parent) as own:
        partial = Path(own, root.name)
        partial.mkdir()
        for number, (tree, wanted, count, size) in enumerate(trees):
            if wanted:
                write_tree(partial, tree, number, count, size, seed)
        os.rename(partial, root)  # fails if another process was faster


def demo_scenes(source: str) -> Path:
    """The folder of the built-in scenes with this source domain; drawn on first use."""
    root = Path("data/scenes")
    if source in ("synthia", "synscapes"):
        root = Path(f"data/scenes-{source}")
    if common.rank() == 0 and not root.exists():
        print(f"drawing the built-in street scenes into {root} ...", flush=True)
        try:
            write_scenes(root, synthia=source == "synthia", synscapes=source == "synscapes")
        except (OSError, common.UserError):
            if not root.exists():
                raise
            # Another process was faster, with the same scenes.
    common.barrier()
    return root


# ---------------------------------------------------------------- 9 command line


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    size = common.WxH
    parser.add_argument("root", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="each seed draws different scenes")
    parser.add_argument("--source-size", type=size, default=(256, 128), help="WxH (256x128)")
    parser.add_argument("--target-size", type=size, default=(256, 128), help="WxH (256x128)")
    parser.add_argument("--num-source", type=int, default=400, help="source images (400)")
    parser.add_argument("--num-target", type=int, default=400, help="target images (400)")
    parser.add_argument("--num-val", type=int, default=100, help="validation images (100)")
    parser.add_argument("--synthia", action="store_true", help="also write a SYNTHIA tree")
    parser.add_argument("--synscapes", action="store_true", help="also write a Synscapes tree")
    write_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    common.launch(main)
