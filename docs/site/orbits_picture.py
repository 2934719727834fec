"""Draws docs/equivalent_atoms.svg: the orbits of a cubic perovskite, and the nearest entries of its list.

`python docs/site/orbits_picture.py` writes the file.
"""

import itertools
from pathlib import Path

import torch

from crystalformer.geometry.orbit_images import build_orbit_images

FILE = Path(__file__).parents[1] / "equivalent_atoms.svg"
EDGE, NEAR, SIDE, WIDTH, HEIGHT = 3.905, 4.0, 170, 760, 360  # Å, Å, pixels
ELEMENTS, COLORS, RADII = ("Sr", "Ti", "O"), ("#2563a8", "#d9772b", "#3a9a78"), (15, 12, 9)
ATOMS = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.5], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]).double()
ORBIT = torch.tensor([0, 1, 2, 2, 2])
FONT = 'font-family="sans-serif" font-size="13"'


def place(x: float, y: float, z: float) -> tuple[float, float]:
    """Where a point of the cell, in fractions of its edges, is on the page."""
    return 190 + SIDE * (0.86 * y - 0.42 * x), 235 + SIDE * (0.18 * x + 0.14 * y - 0.98 * z)


def cell() -> list[str]:
    """The edges of the cell and all atoms in it and on its faces, those in front last."""
    corners = list(itertools.product((0.0, 1.0), repeat=3))
    edges = [
        (a, b) for a, b in itertools.combinations(corners, 2) if sum(x != y for x, y in zip(a, b, strict=True)) == 1
    ]
    lines = [
        '<line x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}" stroke="#8a8f98"/>'.format(*place(*a), *place(*b))
        for a, b in edges
    ]
    atoms = []
    for atom, orbit in zip(ATOMS.tolist(), ORBIT.tolist(), strict=True):
        for x, y, z in itertools.product(*([a, a + 1] if a == 0 else [a] for a in atom)):
            column, line = place(x, y, z)
            circle = (
                f'<circle cx="{column:g}" cy="{line:g}" r="{RADII[orbit]}" fill="{COLORS[orbit]}" stroke="#ffffff"/>'
            )
            atoms.append((2 * x + y + z, circle))
    return lines + [circle for _, circle in sorted(atoms)]


def rows() -> list[str]:
    """Each orbit with the other orbits that it sees within NEAR: of which one, how many, how far away."""
    lattice, ptr = EDGE * torch.eye(3).double()[None], torch.tensor([0, len(ATOMS)])
    images = build_orbit_images(EDGE * ATOMS, lattice, ptr, ORBIT)
    lines = []
    for orbit, (first, last) in enumerate(itertools.pairwise(images.row_ptr.tolist())):
        y = 92 + 66 * orbit
        lines += disc(orbit, 415, y) + text(435, y, f"{ELEMENTS[orbit]} sees", "bold")
        distance, column = images.distance[first:last], images.col[first:last]
        near = ((distance > 0) & (distance < NEAR)).nonzero()[:, 0]
        for i, entry in enumerate(near[distance[near].argsort()].tolist()):
            x, line = 415 + 110 * (i % 3), y + 25 + 20 * (i // 3)
            other, count = int(column[entry]), int(images.repeats[first + entry])
            lines += disc(other, x, line, 5) + text(x + 11, line, f"{count} at {float(distance[entry]):.3f} Å")
    return lines


def disc(orbit: int, x: float, y: float, radius: float | None = None) -> list[str]:
    return [f'<circle cx="{x:g}" cy="{y - 4.5:g}" r="{radius or RADII[orbit]}" fill="{COLORS[orbit]}"/>']


def text(x: float, y: float, words: str, weight: str = "normal", anchor: str = "start") -> list[str]:
    return [f'<text x="{x:g}" y="{y:g}" {FONT} font-weight="{weight}" text-anchor="{anchor}">{words}</text>']


def picture() -> str:
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}">',
            f'<rect {size} rx="10" fill="#ffffff"/>',
            *cell(),
            *text(415, 50, f"{len(ATOMS)} atoms, {len(ELEMENTS)} orbits: {len(ELEMENTS)} rows"),
            *rows(),
            *text(
                WIDTH / 2,
                HEIGHT - 18,
                "the three oxygen atoms of SrTiO₃ see the same, so one row stands for them",
                anchor="middle",
            ),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(picture())
