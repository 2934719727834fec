"""An embedding that starts from the properties of the elements: what these are, and which trainings have it."""

import itertools

import pytest
import torch
from command_line import SIZES
from crystal_files import write_csv

import crystalformer
from crystalformer.app import cli
from crystalformer.common.elements import NUM_ELEMENTS, SYMBOLS
from crystalformer.data.ionic import ionic_crystals
from crystalformer.training.element_properties import PROPERTIES, element_properties, embed_properties

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pymatgen.*")
# Neighbours in their groups or periods.
ALIKE = ("Na K", "Rb Cs", "Ca Sr", "Cl Br", "Fe Co", "Nb Ta", "Zr Hf", "La Ce", "Er Tm", "Al Ga", "S Se", "Pd Pt")


def likeness(weight: torch.Tensor) -> tuple[float, float]:
    """The mean cosine between the features (98,d) of elements that are alike, and between all pairs."""
    cosines = torch.nn.functional.cosine_similarity(weight[:, None], weight, dim=2)
    pairs = [[SYMBOLS.index(x) for x in pair.split()] for pair in ALIKE]
    every = torch.tensor(list(itertools.combinations(range(NUM_ELEMENTS), 2)))
    return float(cosines[tuple(torch.tensor(pairs).T)].mean()), float(cosines[tuple(every.T)].mean())


def test_properties_of_the_elements():
    found = dict(zip(PROPERTIES, element_properties().T, strict=True))
    assert SYMBOLS[int(found["X"].argmax())] == "F"
    assert SYMBOLS[int(found["ionization_energy"].argmax())] == "He"
    assert SYMBOLS[int(found["melting_point"].topk(2).indices[1])] == "W"  # behind carbon
    mass = found["atomic_mass"]
    silver, copper, helium = (SYMBOLS.index(x) for x in ("Ag", "Cu", "He"))
    ratio = (mass[silver] - mass[copper]) / (mass[copper] - mass[helium])  # of logarithms of 107.87, 63.55 and 4.0026
    torch.testing.assert_close(ratio, torch.tensor(0.191367, dtype=torch.float64), rtol=1e-3, atol=0)
    assert found["X"][helium] == 0  # it has none
    for name, values in found.items():
        known = values[values != 0]
        assert abs(known.mean()) < 1e-9, name
        assert abs(known.std(correction=0) - 1) < 1e-9, name


def test_similar_elements_begin_alike():
    torch.manual_seed(0)
    model = crystalformer.Crystalformer()
    before = model.embedding.weight.detach().clone()
    embed_properties(model)
    weight = model.embedding.weight.detach()
    alike, others = likeness(weight)
    assert alike > 0.5
    assert abs(others) < 0.1
    assert max(map(abs, likeness(before))) < 0.1
    assert 0.9 < weight.std() / before.std() < 1.1
    assert len(weight.unique(dim=0)) == NUM_ELEMENTS
    assert weight.dtype == before.dtype


def test_trainings_with_it(tmp_path):
    """By the option and by the preset; a training from another keeps the embedding of that."""
    rows = [["id", "energy", "cif"]]
    for number, x in enumerate(ionic_crystals(16, seed=1)):
        rows.append([f"salt-{number}", x.energy, x.structure.remove_oxidation_states().to(fmt="cif")])
    salts = write_csv(tmp_path / "salts.csv", rows)
    still = ["--epochs=1", "--lr=1e-12", "--weight_decay=0", "--bias_decay=0"]  # the model is what it began as

    def start(name: str, *options: str) -> torch.Tensor:
        out = tmp_path / name
        assert cli.main(["train", "--data", str(salts), "--target=energy", "--out", str(out), *still, *options]) == 0
        return crystalformer.load(out).model.embedding.weight.detach()

    sizes = [f"--model.{x}" for x in SIZES.split()]
    random = start("random", *sizes)
    option = start("option", *sizes, "--embedding=properties")
    small = start("small", *sizes, "--preset=small")
    assert likeness(option)[0] > 0.5 > likeness(random)[0]
    torch.testing.assert_close(small, option)
    other = start("other", "--from", str(tmp_path / "random"), "--preset=small", "--seed=3")
    torch.testing.assert_close(other, random)
