"""What tests of the command line share: a model that trains in a second, and commands that are refused."""

from crystalformer.app import cli

SIZES = "model_dim=16 num_heads=2 num_blocks=1 ff_dim=32 readout_dims=16 num_basis=8 r0=0.7 tol=1e-3"


def refused(capsys, *arguments) -> str:
    """The line that a command ends with; it must be the only one, with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(x) for x in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("crystalformer: ")
    assert err.count("\n") == 1
    return err
