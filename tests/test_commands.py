"""The command line without data: its help, its presets, what the doctor says, models of the paper's code."""

import json
import sys

import pytest
import torch
import yaml
from command_line import refused
from test_convert import PARAMS, official_state

import crystalformer
from crystalformer.app import cli, doctor


def test_presets_and_print_config(capsys, tmp_path):
    def printed(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *arguments, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    for preset, epochs, batch_size in (("mp", 500, 128), ("jarvis", 800, 256), ("jarvis-mbj", 1600, 256)):
        config = printed("--preset", preset)
        assert (config["epochs"], config["batch_size"], config["average_epochs"]) == (epochs, batch_size, 50)
        assert (config["lr"], config["betas"], config["weight_decay"]) == (5e-4, [0.9, 0.98], 1e-5)
        assert config["bias_decay"] == 0.01  # as in the paper's code
        assert (config["embedding"], config["model"]["r0"]) == ("random", [1.4])
    assert printed("--epochs", "7", "--preset=jarvis")["epochs"] == 7
    small = printed("--preset", "small")
    assert (small["epochs"], small["batch_size"], small["lr"], small["embedding"]) == (200, 32, 1e-3, "properties")
    assert small["model"] == config["model"] | {"r0": [2.0]}
    file = tmp_path / "config.yaml"
    file.write_text("preset: jarvis-mbj\nbatch_size: 3\ntarget: energy\nmodel: {domain: multihead, r0: 0.9}\n")
    config = printed("--config", str(file))
    assert (config["epochs"], config["batch_size"], config["model"]["domain"]) == (1600, 3, "multihead")
    assert (config["target"], config["model"]["r0"]) == (["energy"], [0.9])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: crystalformer {command}")


def test_overview_and_doctor(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("triton", "reference   ready", "lightning", "pymatgen", torch.__version__):
        assert text in out


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    extra = doctor.Extra("Reading", {"numpy": "nothing", "no-such-package": "no fun"}, "'crystalformer[data]'")
    monkeypatch.setitem(doctor.EXTRAS, "data", extra)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no-such-packagemissing: no fun\n  pip install 'crystalformer[data]' or pip install no-such-package" in out


def test_a_missing_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "jsonargparse is missing: pip install 'crystalformer[data,train]'" in refused(capsys, "info", "x")


def test_convert(capsys, tmp_path):
    torch.save(official_state(), tmp_path / "model.pt")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    out = tmp_path / "model"
    arguments = ["convert", str(tmp_path / "model.pt"), "--params", str(tmp_path / "params.json"), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert crystalformer.load(out).names == ("bandgap",)
    assert "must be a new or an empty folder" in refused(capsys, *arguments)
