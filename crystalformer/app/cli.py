"""The command line: crystalformer train, crossval, predict, evaluate, info, convert, doctor.

Whatever is wrong with the arguments or the data ends in one line on stderr and exit code 2, Ctrl-C in one and 130,
SIGTERM in one and 143.
"""

import dataclasses
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.elements import SYMBOLS
from ..common.process import (
    INTERRUPTED,
    PROG,
    TERMINATED,
    Terminated,
    finish_output,
    ignore_signals,
    interruptible,
    leave,
    prepare_streams,
)
from ..common.version import version
from ..common.words import short
from .doctor import doctor
from .metrics import guess, keys, kind_in, not_learnt, read_metrics
from .options import make_parser, parse
from .prediction_commands import evaluate, load_model, predict
from .training_commands import crossval, train
from .user_errors import Stop, say, user_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 1 where a part of the work could not be done, 2 for wrong input, 130 for Ctrl-C, 143 for
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    with interruptible(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(message)
        try:
            try:
                return _command(arguments)
            finally:
                finish_output()
        except BrokenPipeError:  # the reader of stdout has gone, as in `crystalformer predict ... | head`
            return 1
        except KeyboardInterrupt:
            stop = Stop("stopped", INTERRUPTED)
        except Terminated:
            stop = Stop("stopped", TERMINATED)
        except OSError as error:
            if error.filename is not None:  # a file's, which is never stdout
                raise
            stop = Stop(f"stdout: {error}", 1)
        except Stop as error:
            stop = error
        say(stop)
        return stop.code


def program() -> int:
    """`main`, with a Python that ends behind it: a signal that comes then does not change the exit code."""
    try:
        return main()
    except (KeyboardInterrupt, Terminated) as error:  # between two lines of main
        leave(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        raise
    finally:
        ignore_signals()


def _command(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"{PROG} {version}")
    elif name not in COMMANDS:
        raise Stop(f"the command must be one of {', '.join(COMMANDS)}, not {name!r}: see {PROG} --help")
    else:
        return COMMANDS[name](arguments[1:])
    return 0


def _overview() -> str:
    lines = [f"usage: {PROG} COMMAND ...", "", "Learns and predicts properties of crystals.", ""]
    lines += [f"  {name:10}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    lines += ["", f"{PROG} COMMAND --help explains a command; {PROG} --version."]
    return "\n".join(lines)


def info(arguments: list[str]) -> int:
    """Prints what a model is: targets, size, settings, errors."""
    parser = make_parser("info", info)
    parser.add_argument("model", type=Path, help="folder of a training or a model")
    options = parse(parser, arguments)
    predictor = load_model(options.model, "cpu")
    lines = {
        "targets": ", ".join(predictor.labels),
        "parameters": f"{sum(x.numel() for x in predictor.model.parameters()):,}",
    }
    with user_errors():
        metrics = read_metrics(options.model)
    for score in kind_in(metrics):
        mine, of_mean = keys([score])
        for part, values in metrics.get(mine, {}).items():
            for name, value in values.items():
                said = f"{short(value)}, of predicting {guess(metrics, name)} {short(metrics[of_mean][part][name])}"
                lines[f"{part} {score.word}, {name}"] = said
    if nothing := not_learnt(metrics):
        lines["nothing learnt of"] = ", ".join(nothing)
    for key in ("crystals", "epochs", "versions"):
        if key in metrics:
            value = metrics[key]
            lines[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    if elements := predictor.model.config.elements:
        lines["elements"] = ", ".join(SYMBOLS[z - 1] for z in elements)
    settings = dataclasses.asdict(predictor.model.config).items()
    lines |= {name: str(x) for name, x in settings if name not in ("target_names", "target_units", "elements")}
    for name, line in lines.items():
        print(f"{name:24}{line}")
    return 0


def convert(arguments: list[str]) -> int:
    """Makes a model of a checkpoint of the paper's code."""
    parser = make_parser("convert", convert)
    parser.add_argument("checkpoint", type=Path, help="file of the paper's code, .ckpt or .pt")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, new or empty")
    parser.add_argument(
        "--params",
        type=str | None,
        default=None,
        help="its JSON of parameters, or a file of it, for a bare state dict",
    )
    parser.add_argument("--weights", choices=["auto", "swa", "model"], default="auto", help="swa is the weight average")
    options = parse(parser, arguments)
    with user_errors():
        from ..model.convert import load_official

        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise Stop(f"out must be a new or an empty folder, not {options.out}")
        model = load_official(options.checkpoint, options.params, options.weights)
        model.save_pretrained(options.out)
    print(f"{options.out}: {sum(x.numel() for x in model.parameters()):,} parameters")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "crossval": crossval,
    "predict": predict,
    "evaluate": evaluate,
    "info": info,
    "convert": convert,
    "doctor": doctor,
}
