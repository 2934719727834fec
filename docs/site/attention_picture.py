"""Draws docs/attention.svg: an atom of a square crystal and its weights for the periodic images around it.

`python docs/site/attention_picture.py` writes the file.
"""

from pathlib import Path

import torch

import crystalformer as cf

FILE = Path(__file__).parents[1] / "attention.svg"
CELL, DECAY, SCALE, WIDTH, HEIGHT = 3.0, 0.05, 26, 760, 360  # Å, Å⁻², pixels an Å, pixels
COLORS = ("#2563a8", "#d9772b")


def picture() -> str:
    """The images with z = 0 in the list of atom 0, at their places; opacity and width show the weight exp(-a d²)."""
    positions = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).double() * CELL
    lattice = torch.diag(torch.tensor([CELL, CELL, 40.0])).double()[None]
    images = cf.build_images(positions, lattice, torch.tensor([0, 2]), cutoff=18.0)
    first, last = images.row_ptr[:2].tolist()
    col, shift = images.col[first:last], images.shift[first:last]
    places = positions[col] + shift.double() @ lattice[0]
    flat = (shift[:, 2] == 0) & (places[:, 0].abs() < WIDTH / 2 / SCALE - 0.5)
    flat &= places[:, 1].abs() < HEIGHT / 2 / SCALE - 1.5
    weights = (-DECAY * places.square().sum(1)).exp()
    x0, y0 = WIDTH / 2, HEIGHT / 2 - 12

    lines, atoms = [], []
    for j, (x, y, _), weight in zip(col[flat].tolist(), places[flat].tolist(), weights[flat].tolist(), strict=True):
        x1, y1 = x0 + SCALE * x, y0 - SCALE * y
        if 0.003 < weight < 1:
            line = f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke-width="{1 + 7 * weight:.2f}"'
            lines.append(f'{line} stroke="{COLORS[j]}" opacity="{0.12 + 0.75 * weight:.2f}"/>')
        atom = f'<circle cx="{x1:g}" cy="{y1:g}" r="{9 - 2 * j}" fill="{COLORS[j]}"'
        atoms.append(f'{atom} opacity="{0.22 + 0.78 * weight:.2f}"/>')
    side = SCALE * CELL
    cell = f'<rect x="{x0 - side / 4:g}" y="{y0 - side * 3 / 4:g}" width="{side:g}" height="{side:g}" fill="none"'
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    font = 'text-anchor="middle" font-family="sans-serif" font-size="13"'
    text = "every atom attends to every periodic image of every atom, with weights exp(q·k − a d²), normalised to 1"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {HEIGHT}">',
            f'<rect {size} rx="10" fill="#ffffff"/>',
            f'{cell} stroke="#8a8f98" stroke-dasharray="5 4"/>',
            *lines,
            *atoms,
            f'<circle cx="{x0:g}" cy="{y0:g}" r="13" fill="none" stroke="#1f2937" stroke-width="2"/>',
            f'<text x="{x0:g}" y="{HEIGHT - 14}" {font}>{text}</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(picture())
